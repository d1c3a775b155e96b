r"""States of units of keys merged for the blocks of queries that read them, in Triton.

A state is a mean `u` and the log `b` of its weight. Block i gets `O_i = sum_k w_ik u_k` over the units k it reads,
with `w_ik = exp(b_k - B_i)` and `B_i = logsumexp_k b_k`. A program owns a few slots and walks over the units, with a
running sum relative to the largest `b_k` so far: nothing overflows, and rounding does not pile up in the logs. Units
before and after a block are one walk in each direction; nothing is ever subtracted.

The derivatives are sums over the readers of a unit, in the same form:

    du_k = sum_i w_ik dO_i,    db_k = sum_i w_ik (dO_i . (u_k - O_i) + dB_i)

Here `exp(-B_i)` is what varies with i, so the running sum is relative to the smallest `B_i` so far; `b_k` is at most
that, since every one of those readers sees k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import CompileCases, check, launch, padded
from ..triton_products import narrow
from .reach import BlockReach

# Entries of a tile of slots: few enough that prefetching the next unit hides its latency.
_TILE_ENTRIES = 1024


@triton.jit
def _joined(total, top, mean, mass, entry):
    """The sum `mean` (weights `total`, relative to `exp(top)`) and one more entry of weight `exp(mass)`."""
    new_top = tl.maximum(top, mass)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = tl.exp(top - base), tl.exp(mass - base)
    entry = tl.where((new > 0.0)[:, None], entry, 0.0)  # what an empty state holds does not matter
    return total * old + new, new_top, mean * old[:, None] + entry * new[:, None]


@triton.jit
def _reader(edge, units, margin, blocks, AFTER: tl.constexpr):
    """The block that reads exactly the units before (or, with AFTER, from) number `edge`, and whether there is one."""
    if AFTER:
        block = (edge - margin) // units - 1
        return block, ((edge - margin) % units == 0) & (block >= 0) & (edge >= margin) & (block < blocks)
    block = (edge + margin) // units
    return block, ((edge + margin) % units == 0) & (block < blocks)


@triton.jit
def _scan_forward(
    output,
    lse,
    merged,
    merged_mass,
    num_units,
    blocks,
    slots,
    dim,
    units,
    margin,
    steps,
    AFTER: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
):
    """The merge of all units before each block; with AFTER, those after it are joined to what `merged` holds."""
    tiles = tl.cdiv(slots, TILE)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    slot = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, DIM)
    in_dim = (column < dim)[None, :]

    total = tl.zeros([TILE], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    mean = tl.zeros([TILE, DIM], tl.float32)
    for step in tl.range(0, steps, num_stages=3):
        edge = num_units - step if AFTER else step
        block, exists = _reader(edge, units, margin, blocks, AFTER)
        write = slot < tl.where(exists, slots, 0)
        at_mass = (group * blocks + block) * slots + slot
        at = at_mass[:, None] * dim + column[None, :]
        now_total, now_top, now = total, top, mean
        if AFTER:
            # The other side's mean has the weight exp(mass): one more entry.
            other = tl.load(merged + at, mask=write[:, None] & in_dim, other=0.0).to(tl.float32)
            other_mass = tl.load(merged_mass + at_mass, mask=write, other=float("-inf"))
            now_total, now_top, now = _joined(total, top, mean, other_mass, other)
        whole = tl.where(now_total == 0.0, 1.0, now_total)
        tl.store(merged + at, narrow(now / whole[:, None], merged.dtype.element_ty), mask=write[:, None] & in_dim)
        tl.store(merged_mass + at_mass, now_top + tl.log(whole), mask=write)

        unit = edge - 1 if AFTER else edge
        read = slot < tl.where(unit < num_units, slots, 0)
        at_mass = (group * num_units + unit) * slots + slot
        at = at_mass[:, None] * dim + column[None, :]
        entry = tl.load(output + at, mask=read[:, None] & in_dim, other=0.0).to(tl.float32)
        mass = tl.load(lse + at_mass, mask=read, other=float("-inf"))
        total, top, mean = _joined(total, top, mean, mass, entry)


@triton.jit
def _scan_backward(
    grad_merged,
    grad_merged_mass,
    merged,
    merged_mass,
    output,
    lse,
    grad_output,
    grad_mass,
    num_units,
    blocks,
    slots,
    dim,
    units,
    margin,
    steps,
    AFTER: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Sums over the blocks that read each unit as one before them; with AFTER, the others are added to those."""
    tiles = tl.cdiv(slots, TILE)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    slot = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, DIM)
    in_dim = (column < dim)[None, :]

    lowest = tl.full([TILE], float("inf"), tl.float32)
    summed = tl.zeros([TILE, DIM], tl.float32)  # of exp(lowest - B_i) dO_i
    shifts = tl.zeros([TILE], tl.float32)  # of exp(lowest - B_i) (dB_i - dO_i . O_i)
    for step in tl.range(0, steps, num_stages=2):
        unit = step if AFTER else steps - 1 - step
        block, exists = _reader(unit if AFTER else unit + 1, units, margin, blocks, AFTER)
        read = slot < tl.where(exists, slots, 0)
        at_mass = (group * blocks + block) * slots + slot
        at = at_mass[:, None] * dim + column[None, :]
        mass = tl.load(merged_mass + at_mass, mask=read, other=float("-inf"))
        seen = mass > float("-inf")  # a block that read nothing passes nothing on
        grad = tl.load(grad_merged + at, mask=read[:, None] & in_dim, other=0.0).to(tl.float32)
        grad = tl.where(seen[:, None], grad, 0.0)
        result = tl.load(merged + at, mask=read[:, None] & in_dim, other=0.0).to(tl.float32)
        shift = tl.load(grad_merged_mass + at_mass, mask=read, other=0.0)
        shift = tl.where(seen, shift, 0.0) - tl.sum(grad * result, 1)
        mass = tl.where(seen, mass, float("inf"))
        base = tl.minimum(lowest, mass)
        finite = tl.where(base == float("inf"), 0.0, base)
        old, new = tl.exp(finite - lowest), tl.exp(finite - mass)
        summed = summed * old[:, None] + grad * new[:, None]
        shifts = shifts * old + shift * new
        lowest = base

        write = slot < tl.where(unit < num_units, slots, 0)
        at_mass = (group * num_units + unit) * slots + slot
        at = at_mass[:, None] * dim + column[None, :]
        mass = tl.load(lse + at_mass, mask=write, other=float("-inf"))
        entry = tl.load(output + at, mask=write[:, None] & in_dim, other=0.0).to(tl.float32)
        weight = tl.where(lowest < float("inf"), tl.exp(tl.minimum(mass - finite, 0.0)), 0.0)
        entry = tl.where((weight > 0.0)[:, None], entry, 0.0)
        found = summed * weight[:, None]
        found_mass = tl.sum(found * entry, 1) + shifts * weight
        if AFTER:
            found += tl.load(grad_output + at, mask=write[:, None] & in_dim, other=0.0)
            found_mass += tl.load(grad_mass + at_mass, mask=write, other=0.0)
        tl.store(grad_output + at, found, mask=write[:, None] & in_dim)
        tl.store(grad_mass + at_mass, found_mass, mask=write)


def scan_forward(output: Tensor, lse: Tensor, blocks: int, reach: BlockReach) -> tuple[Tensor, Tensor]:
    """For every block of queries the merged state of the units that it reads.

    Args:
        output: `[groups, units, slots, dim]`.
        log_mass: `[groups, units, slots]`, float32, `-inf` for an empty state.
        blocks: Number of blocks. reach: Which units a block reads.
    Returns: `[groups, blocks, slots, dim]` and `[groups, blocks, slots]`; empty (output 0, mass `-inf`) where a block
        reads nothing.
    Raises: UnsupportedError for tensors that Triton cannot take.
    """
    output, lse = output.contiguous(), lse.contiguous()
    check(output, lse, head_dims=(output.shape[-1],))
    groups, num_units, slots, dim = output.shape
    # The first of two walks leaves its result to the second, which should not read it rounded.
    merged = output.new_empty(groups, blocks, slots, dim, dtype=output.dtype if reach.is_causal else torch.float32)
    merged_mass = torch.empty_like(merged[..., 0], dtype=torch.float32, memory_format=torch.contiguous_format)
    first = min(blocks, triton.cdiv(reach.margin, reach.units))  # blocks with nothing before them but their margin
    merged[:, :first], merged_mass[:, :first] = 0.0, float("-inf")
    programs, constants = _plan(output)
    sizes = (num_units, blocks, slots, dim, reach.units, reach.margin)
    arguments = (output, lse, merged, merged_mass, *sizes)
    launch(_scan_forward, programs, *arguments, reach.before(blocks - 1) + 1, AFTER=False, **constants)
    if not reach.is_causal:
        launch(_scan_forward, programs, *arguments, num_units, AFTER=True, **constants)
    return merged.to(output.dtype), merged_mass


def scan_backward(
    grad_output: Tensor,
    grad_mass: Tensor,
    output: Tensor,
    lse: Tensor,
    merged: Tensor,
    merged_mass: Tensor,
    reach: BlockReach,
) -> tuple[Tensor, Tensor]:
    """Gradients of `scan_forward` for its `output` and `lse`, given those of its results.

    Args:
        grad_output, grad_mass: Shaped as the results; where the merged mass is `-inf` they are not looked at.
        output, log_mass, reach: As given to `scan_forward`. merged, merged_mass: Its results.
    Raises: as `scan_forward`.
    """
    tensors = [z.contiguous() for z in (grad_output, grad_mass, merged, merged_mass, output, lse)]
    check(*tensors, head_dims=(output.shape[-1],))
    _, num_units, slots, dim = output.shape
    blocks = merged.shape[1]
    grads = (
        output.new_empty(output.shape, dtype=torch.float32),
        output.new_empty(output.shape[:-1], dtype=torch.float32),
    )
    programs, constants = _plan(output)
    arguments = (*tensors, *grads, num_units, blocks, slots, dim, reach.units, reach.margin)
    # Blocks may begin beyond the last unit.
    steps = max(num_units, reach.before(blocks - 1))
    launch(_scan_backward, programs, *arguments, steps, AFTER=False, **constants)
    if not reach.is_causal:
        launch(_scan_backward, programs, *arguments, num_units, AFTER=True, **constants)
    return grads[0].to(output.dtype), grads[1]


def _plan(output: Tensor) -> tuple[int, dict[str, int]]:
    """Programs and block sizes of a launch."""
    groups, _, slots, dim = output.shape
    width = padded(dim)
    tile = max(4, min(_TILE_ENTRIES // width, triton.next_power_of_2(slots)))
    return groups * triton.cdiv(slots, tile), {"TILE": tile, "DIM": width}


def _case(is_causal: bool, dim: int, dtype: torch.dtype) -> None:
    output, lse = torch.zeros(1, 4, 256, dim, dtype=dtype), torch.zeros(1, 4, 256)
    reach = BlockReach(is_causal=is_causal)
    merged = scan_forward(output, lse, 4, reach)
    scan_backward(*merged, output, lse, *merged, reach)


COMPILE_CASES: CompileCases = {
    "scan, bfloat16": lambda: _case(True, 64, torch.bfloat16),
    "scan, float32, both sides": lambda: _case(False, 64, torch.float32),
    "scan, float16, both sides, head_dim 80": lambda: _case(False, 80, torch.float16),
    "scan, float32, both sides, head_dim 256": lambda: _case(False, 256, torch.float32),
}
