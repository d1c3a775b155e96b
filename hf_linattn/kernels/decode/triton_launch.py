"""`decode_step` in Triton."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..slot_inputs import SlotInputs
from ..triton_common import CompileCases, check, launch, padded, rows
from .triton_kernel import step

# Entries of a tile: three of them (two of slots, one of the state) are in registers at a time.
_TILE_ENTRIES = 4096


def decode_step(inputs: SlotInputs, state: AttentionState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in torch, with exactly two leading dimensions, batch and heads, written out or expanded.

    Raises: UnsupportedError, InputError for inputs that the kernel does not take.
    """
    batch, heads, slots, head_dim = state.output.shape
    dim = inputs.query.shape[-1]
    check(*inputs, *state, head_dims=(dim, head_dim))
    query, query_slots, query_slot_bias, key, key_bias, key_slots, key_slot_bias, value = inputs
    query, key, key_bias, value = query.contiguous(), key.contiguous(), key_bias.contiguous(), value.contiguous()
    query_slots, key_slots = rows(query_slots), rows(key_slots)
    state = AttentionState(state.output.contiguous(), state.lse.contiguous())
    output, lse = torch.empty_like(value), state.lse.new_empty(batch, heads, 1)
    new_output, new_lse = torch.empty_like(state.output), torch.empty_like(state.lse)
    widths = padded(dim), padded(head_dim)
    launch(
        step,
        batch * heads,
        *(query, query_slots, query_slot_bias, key, key_bias, key_slots, key_slot_bias, value),
        *(*state, output, lse, new_output, new_lse),
        *(*query_slots.stride()[:3], *query_slot_bias.stride(), *key_slots.stride()[:3], *key_slot_bias.stride()),
        *(heads, slots),
        D=dim,
        E=head_dim,
        D_PADDED=widths[0],
        E_PADDED=widths[1],
        BLOCK=min(padded(slots), max(16, _TILE_ENTRIES // max(widths))),
    )
    return output, lse, new_output, new_lse


def _compile_case(dtype: torch.dtype, head_dim: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(2, 4, *shape, dtype=dtype, device="meta")

    token, bias = empty(1, head_dim, dtype=dtype), empty(1)
    slots, slot_bias = empty(256, head_dim), empty(256)
    inputs = SlotInputs(token, slots, slot_bias, token, bias, slots, slot_bias, token)
    decode_step(inputs, AttentionState(slots, slot_bias))


COMPILE_CASES: CompileCases = {
    f"{str(dtype)[6:]}-{head_dim}": partial(_compile_case, dtype, head_dim)
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.float32, 64), (torch.bfloat16, 256))
}
