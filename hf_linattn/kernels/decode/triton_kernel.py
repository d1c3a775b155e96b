"""One token of generation through slots, in one kernel: a program updates and reads the slots of one head."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import InputError
from ..triton_common import LN_2, LOG2_E, CompileCases, check, launch, padded, rows
from ..triton_tiles import at, load_tile, store_tile

# Entries of a tile: three of them (two of slots, one of the state) are in registers at a time.
_TILE_ENTRIES = 4096


@triton.jit
def _load_vector(base, SIZE: tl.constexpr, PADDED: tl.constexpr):
    index = tl.arange(0, PADDED)
    return tl.load(base + index, mask=index < SIZE, other=0.0).to(tl.float32)


# fmt: off
@triton.jit(do_not_specialize=["num_slots"])
def _step(
    query, query_bias, key, key_bias, value, query_slots, query_slot_bias, key_slots, key_slot_bias,
    state_output, state_mass, output, lse, new_output, new_mass,
    query_slots_b, query_slots_h, query_slots_m, query_slot_bias_b, query_slot_bias_h, query_slot_bias_m,
    key_slots_b, key_slots_h, key_slots_m, key_slot_bias_b, key_slot_bias_h, key_slot_bias_m,
    num_heads, num_slots,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: on
    """All but the slots and their biases is contiguous. Masses are to base 2 inside."""
    group = tl.program_id(0).to(tl.int64)
    batch, head = group // num_heads, group % num_heads
    q, k = _load_vector(query + group * D, D, D_PADDED), _load_vector(key + group * D, D, D_PADDED)
    v = _load_vector(value + group * E, E, E_PADDED)
    q_bias, k_bias = tl.load(query_bias + group).to(tl.float32), tl.load(key_bias + group).to(tl.float32)
    query_slots = at(query_slots, batch, head, query_slots_b, query_slots_h)
    query_slot_bias = at(query_slot_bias, batch, head, query_slot_bias_b, query_slot_bias_h)
    key_slots = at(key_slots, batch, head, key_slots_b, key_slots_h)
    key_slot_bias = at(key_slot_bias, batch, head, key_slot_bias_b, key_slot_bias_h)
    first = group * num_slots

    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    read = tl.zeros([E_PADDED], tl.float32)
    for start in range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < num_slots
        products = tl.sum(load_tile(key_slots, start, key_slots_m, num_slots, BLOCK, D, D_PADDED) * k[None, :], 1)
        bias = tl.load(key_slot_bias + slot * key_slot_bias_m, mask=inside, other=float("-inf"))
        gained = (products + k_bias + bias) * LOG2_E
        held = tl.load(state_mass + first + slot, mask=inside, other=float("-inf")) * LOG2_E
        larger = tl.maximum(gained, held)
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        gained, held = tl.exp2(gained - finite), tl.exp2(held - finite)
        both = gained + held
        empty = both == 0.0
        safe = tl.where(empty, 1.0, both)
        mass = tl.where(empty, float("-inf"), finite + tl.log2(safe))
        tl.store(new_mass + first + slot, mass * LN_2, mask=inside)
        tile = load_tile(state_output + first * E, start, E, num_slots, BLOCK, E, E_PADDED)
        tile = tile * (held / safe)[:, None] + v[None, :] * (gained / safe)[:, None]
        store_tile(new_output + first * E, start, E, num_slots, tile, BLOCK, E, E_PADDED)

        products = tl.sum(load_tile(query_slots, start, query_slots_m, num_slots, BLOCK, D, D_PADDED) * q[None, :], 1)
        bias = tl.load(query_slot_bias + slot * query_slot_bias_m, mask=inside, other=float("-inf"))
        logits = (products + bias) * LOG2_E + mass
        new_top = tl.maximum(top, tl.max(logits, 0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, decay = tl.exp2(logits - finite_top), tl.exp2(top - finite_top)
        total = total * decay + tl.sum(weights, 0)
        read = read * decay + tl.sum(weights[:, None] * tile, 0)
        top = new_top

    nothing = total == 0.0
    safe_total = tl.where(nothing, 1.0, total)
    index = tl.arange(0, E_PADDED)
    tl.store(output + group * E + index, (read / safe_total).to(output.dtype.element_ty), mask=index < E)
    tl.store(lse + group, tl.where(nothing, float("-inf"), (top + tl.log2(safe_total)) * LN_2 + q_bias))


def decode_step(
    query: Tensor,
    query_bias: Tensor,
    key: Tensor,
    key_bias: Tensor,
    value: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    state_output: Tensor,
    state_mass: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.kernels.decode.decode_step` with exactly two leading dimensions, batch and heads, written out or expanded.

    Raises: UnsupportedError, InputError for inputs that the kernel does not take (a state that is not float32).
    """
    inputs = (query, query_bias, key, key_bias, value, query_slots, query_slot_bias, key_slots, key_slot_bias)
    batch, heads, slots, head_dim = state_output.shape
    dim = query.shape[-1]
    check(*inputs, state_output, state_mass, head_dims=(dim, head_dim))
    if state_output.dtype != torch.float32 or state_mass.dtype != torch.float32:
        raise InputError(
            f"The state must be float32; got {state_output.dtype} and {state_mass.dtype}. Keep it in float32."
        )
    query, query_bias, key, key_bias, value = (t.contiguous() for t in inputs[:5])
    query_slots, key_slots = rows(query_slots), rows(key_slots)
    state_output, state_mass = state_output.contiguous(), state_mass.contiguous()
    output, lse = torch.empty_like(value), state_mass.new_empty(batch, heads)
    new_output, new_mass = torch.empty_like(state_output), torch.empty_like(state_mass)
    widths = padded(dim), padded(head_dim)
    launch(
        _step,
        batch * heads,
        *(query, query_bias, key, key_bias, value, query_slots, query_slot_bias, key_slots, key_slot_bias),
        *(state_output, state_mass, output, lse, new_output, new_mass),
        *(*query_slots.stride()[:3], *query_slot_bias.stride(), *key_slots.stride()[:3], *key_slot_bias.stride()),
        *(heads, slots),
        D=dim,
        E=head_dim,
        D_PADDED=widths[0],
        E_PADDED=widths[1],
        BLOCK=min(padded(slots), max(16, _TILE_ENTRIES // max(widths))),
    )
    return output, lse, new_output, new_mass


def _compile_case(dtype: torch.dtype, head_dim: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(2, 4, *shape, dtype=dtype, device="meta")

    token, bias = empty(head_dim, dtype=dtype), empty()
    slots, slot_bias = empty(256, head_dim), empty(256)
    decode_step(token, bias, token, bias, token, slots, slot_bias, slots, slot_bias, slots, slot_bias)


COMPILE_CASES: CompileCases = {
    f"{str(dtype)[6:]}-{head_dim}": partial(_compile_case, dtype, head_dim)
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.float32, 64), (torch.bfloat16, 256))
}
