r"""States of blocks merged over the blocks before, after or around each one, in Triton.

A state is a mean `u` and the log `b` of its weight. Block i gets `O_i = sum_k w_ik u_k` over the blocks k it sees,
with `w_ik = exp(b_k - B_i)` and `B_i = logsumexp_k b_k`. A program owns a few slots and walks over the blocks, with a
running sum relative to the largest `b_k` so far: nothing overflows, and rounding does not pile up in the logs.
"elsewhere" is one walk in each direction; nothing is ever subtracted.

The derivatives are sums over the readers of a block, in the same form:

    du_k = sum_i w_ik dO_i,    db_k = sum_i w_ik (dO_i . (u_k - O_i) + dB_i)

Here `exp(-B_i)` is what varies with i, so the running sum is relative to the smallest `B_i` so far; `b_k` is at most
that, since every one of those readers sees k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....errors import InputError
from ._common import CompileCases, check, launch, padded
from ._products import narrow

MODES = ("before", "after", "elsewhere")

# Entries of a tile of slots: few enough that prefetching the next block hides its latency.
_TILE_ENTRIES = 1024


@triton.jit
def _scan_forward(
    output,
    log_mass,
    merged,
    merged_mass,
    blocks,
    slots,
    dim,
    REVERSE: tl.constexpr,
    JOIN: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
):
    """The merge of all blocks on one side of each; with JOIN also with what `merged` holds, the other side."""
    tiles = tl.cdiv(slots, TILE)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    slot = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, DIM)
    inside = slot < slots
    inside_all = inside[:, None] & (column < dim)[None, :]
    at_mass = (group * blocks + (blocks - 1 if REVERSE else 0)) * slots + slot
    forward = -1 if REVERSE else 1
    at = at_mass[:, None] * dim + column[None, :]

    total = tl.zeros([TILE], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    mean = tl.zeros([TILE, DIM], tl.float32)
    for _ in tl.range(0, blocks, num_stages=3):
        entry = tl.load(output + at, mask=inside_all, other=0.0).to(tl.float32)
        mass = tl.load(log_mass + at_mass, mask=inside, other=float("-inf"))

        now_total, now_top, now = total, top, mean
        if JOIN:
            # The other side's mean has the weight exp(mass): one more entry.
            other = tl.load(merged + at, mask=inside_all, other=0.0).to(tl.float32)
            other_mass = tl.load(merged_mass + at_mass, mask=inside, other=float("-inf"))
            now_total, now_top, now = _joined(total, top, mean, other_mass, other)
        whole = tl.where(now_total == 0.0, 1.0, now_total)
        tl.store(merged + at, narrow(now / whole[:, None], merged.dtype.element_ty), mask=inside_all)
        tl.store(merged_mass + at_mass, now_top + tl.log(whole), mask=inside)
        total, top, mean = _joined(total, top, mean, mass, entry)
        at += forward * slots * dim
        at_mass += forward * slots


@triton.jit
def _joined(total, top, mean, mass, entry):
    """The sum `mean` (weights `total`, relative to `exp(top)`) and one more entry of weight `exp(mass)`."""
    new_top = tl.maximum(top, mass)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = tl.exp(top - base), tl.exp(mass - base)
    entry = tl.where((new > 0.0)[:, None], entry, 0.0)  # what an empty state holds does not matter
    return total * old + new, new_top, mean * old[:, None] + entry * new[:, None]


@triton.jit
def _scan_backward(
    grad_merged,
    grad_merged_mass,
    merged,
    merged_mass,
    output,
    log_mass,
    grad_output,
    grad_mass,
    blocks,
    slots,
    dim,
    REVERSE: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Sums over the readers on one side of each block; with ADD added to what the other side left."""
    tiles = tl.cdiv(slots, TILE)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    slot = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, DIM)
    inside = slot < slots
    inside_all = inside[:, None] & (column < dim)[None, :]
    at_mass = (group * blocks + (blocks - 1 if REVERSE else 0)) * slots + slot
    forward = -1 if REVERSE else 1
    at = at_mass[:, None] * dim + column[None, :]

    lowest = tl.full([TILE], float("inf"), tl.float32)
    summed = tl.zeros([TILE, DIM], tl.float32)  # of exp(lowest - B_i) dO_i
    shifts = tl.zeros([TILE], tl.float32)  # of exp(lowest - B_i) (dB_i - dO_i . O_i)
    for _ in tl.range(0, blocks, num_stages=2):
        mass = tl.load(log_mass + at_mass, mask=inside, other=float("-inf"))
        entry = tl.load(output + at, mask=inside_all, other=0.0).to(tl.float32)
        base = tl.where(lowest == float("inf"), 0.0, lowest)
        weight = tl.where(lowest < float("inf"), tl.exp(tl.minimum(mass - base, 0.0)), 0.0)
        entry = tl.where((weight > 0.0)[:, None], entry, 0.0)
        found = summed * weight[:, None]
        found_mass = tl.sum(found * entry, 1) + shifts * weight
        if ADD:
            found += tl.load(grad_output + at, mask=inside_all, other=0.0)
            found_mass += tl.load(grad_mass + at_mass, mask=inside, other=0.0)
        tl.store(grad_output + at, found, mask=inside_all)
        tl.store(grad_mass + at_mass, found_mass, mask=inside)

        # This block as a reader. One that saw nothing passes nothing on.
        reads = tl.load(merged_mass + at_mass, mask=inside, other=float("-inf"))
        seen = reads > float("-inf")
        grad = tl.load(grad_merged + at, mask=inside_all, other=0.0).to(tl.float32)
        grad = tl.where(seen[:, None], grad, 0.0)
        result = tl.load(merged + at, mask=inside_all, other=0.0).to(tl.float32)
        shift = tl.load(grad_merged_mass + at_mass, mask=inside, other=0.0)
        shift = tl.where(seen, shift, 0.0) - tl.sum(grad * result, 1)
        reads = tl.where(seen, reads, float("inf"))
        new_lowest = tl.minimum(lowest, reads)
        base = tl.where(new_lowest == float("inf"), 0.0, new_lowest)
        old, new = tl.exp(base - lowest), tl.exp(base - reads)
        summed = summed * old[:, None] + grad * new[:, None]
        shifts = shifts * old + shift * new
        lowest = new_lowest
        at += forward * slots * dim
        at_mass += forward * slots


def scan_forward(output: Tensor, log_mass: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """For every block the merged state of other blocks.

    Args:
        output: `[groups, blocks, slots, dim]`.
        log_mass: `[groups, blocks, slots]`, float32, `-inf` for an empty state.
        mode: "before" (all earlier blocks), "after" (all later ones) or "elsewhere" (both).
    Returns: the states, in the shapes given; empty (output 0, mass `-inf`) where there is no such block.
    Raises: InputError for another mode; UnsupportedError for tensors that Triton cannot take.
    """
    walks = _walks(mode)
    output, log_mass = output.contiguous(), log_mass.float().contiguous()
    check(output, log_mass, head_dims=(output.shape[-1],))
    # The first of two walks leaves its result to the second, which should not read it rounded.
    merged = torch.empty_like(output, dtype=torch.float32 if len(walks) == 2 else output.dtype)
    merged_mass = torch.empty_like(log_mass)
    programs, sizes, constants = _plan(output)
    for number, reverse in enumerate(walks):
        launch(
            _scan_forward,
            programs,
            output,
            log_mass,
            merged,
            merged_mass,
            *sizes,
            REVERSE=reverse,
            JOIN=number == 1,
            **constants,
        )
    return merged.to(output.dtype), merged_mass


def scan_backward(
    grad_output: Tensor, grad_mass: Tensor, output: Tensor, log_mass: Tensor, mode: str
) -> tuple[Tensor, Tensor]:
    """Gradients of `scan_forward` for its `output` and `log_mass`, given those of its results.

    Recomputes the results, which are as large as the inputs. The gradient of a mass that is `-inf` is not looked at.
    Raises: as `scan_forward`.
    """
    walks = _walks(mode)
    output, log_mass = output.contiguous(), log_mass.float().contiguous()
    grad_output, grad_mass = grad_output.contiguous(), grad_mass.float().contiguous()
    check(grad_output, grad_mass, output, log_mass, head_dims=(output.shape[-1],))
    merged, merged_mass = scan_forward(output.float(), log_mass, mode)
    grads = torch.empty_like(output, dtype=torch.float32), torch.empty_like(log_mass)
    programs, sizes, constants = _plan(output)
    for number, reverse in enumerate(walks):
        launch(
            _scan_backward,
            programs,
            grad_output,
            grad_mass,
            merged,
            merged_mass,
            output,
            log_mass,
            *grads,
            *sizes,
            REVERSE=not reverse,  # readers of a block lie on its other side
            ADD=number == 1,
            **constants,
        )
    return grads[0].to(output.dtype), grads[1]


def _walks(mode: str) -> list[bool]:
    """Directions of the walks over the blocks, True for backwards."""
    if mode not in MODES:
        raise InputError(f"mode must be one of {list(MODES)}; got {mode!r}.")
    return {"before": [False], "after": [True], "elsewhere": [False, True]}[mode]


def _plan(output: Tensor) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """Programs, sizes and block sizes of a launch."""
    groups, blocks, slots, dim = output.shape
    width = padded(dim)
    tile = max(4, min(_TILE_ENTRIES // width, triton.next_power_of_2(slots)))
    return groups * triton.cdiv(slots, tile), (blocks, slots, dim), {"TILE": tile, "DIM": width}


def _case(mode: str, dim: int, dtype: torch.dtype) -> None:
    output, log_mass = torch.zeros(1, 4, 256, dim, dtype=dtype), torch.zeros(1, 4, 256)
    scan_forward(output, log_mass, mode)
    scan_backward(output, log_mass, output, log_mass, mode)


COMPILE_CASES: CompileCases = {
    f"scan-{mode}-{dim}-{dtype}".replace("torch.", ""): (
        lambda mode=mode, dim=dim, dtype=dtype: _case(mode, dim, dtype)  # type: ignore[misc]
    )
    for mode, dim, dtype in (
        ("before", 64, torch.bfloat16),
        ("elsewhere", 64, torch.float32),
        ("after", 80, torch.float16),
    )
}
