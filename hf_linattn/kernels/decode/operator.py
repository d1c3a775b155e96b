"""One token of generation through slots: the key joins every slot, then the query reads. A state of constant size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from ..attention_state import AttentionState
from ..backends import current_backend
from ..operators import dispatch, register
from ..slot_inputs import SlotInputs
from . import torch_kernel


class Decoded(NamedTuple):
    """What the query reads, `[..., 1, head_dim]` and `[..., 1]`, and the state of the slots after this token."""

    output: Tensor
    lse: Tensor
    state: AttentionState


def decode_step(inputs: SlotInputs, state: AttentionState) -> Decoded:
    """One step of causal attention through slots.

    Args:
        inputs: Of one token, `[..., 1, dim]`, with any leading dimensions. Those of slots broadcast: slots that all
            rows share are not copied. With a key bias of `-inf` the state stays as it is.
        state: Of the slots, `[..., slots, head_dim]` and `[..., slots]`, float32. Before the first token 0 and `-inf`.
    Returns: the output in the dtype of `value`, everything else in that of the state. The given state is not changed.
    Raises: UnsupportedError where gradients are asked for (there are none), InputError if the state is not float32
        (or float64, in torch).
    Cost: O(slots * (dim + head_dim)) time and memory, whatever came before.
    """
    tensors = (*inputs, *state)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise UnsupportedError("decode_step has no gradients. Use torch.no_grad(), or attention over whole sequences.")
    for name, x in (("state.output", state.output), ("state.lse", state.lse)):
        if x.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{name} must be float32: small sums would be lost in {x.dtype}. Keep it in float32.")
    backend = current_backend()
    if not (inputs.value.is_cuda or backend == "triton"):  # plain torch, which a compiler can fuse
        output, lse, *after = torch_kernel.decode_step(inputs, state)
        return Decoded(output, lse, AttentionState(*after))
    lead = state.lse.shape[:-1]
    inner = (2, 2, 1, 2, 1, 2, 1, 2, 2, 1)
    folded = [_fold(t, lead, n) for t, n in zip(tensors, inner, strict=True)]
    output, lse, *after = [t.reshape(*lead, *t.shape[2:]) for t in _step(*folded, backend)]
    return Decoded(output, lse, AttentionState(*after))


def _fold(x: Tensor, lead: torch.Size, inner: int) -> Tensor:
    """`[..., *inner]` as `[batch, heads, *inner]`, without writing out what is shared by the batch."""
    x = x.expand(*[1] * (2 - len(lead)), *lead, *x.shape[x.ndim - inner :])
    return x.flatten(0, -2 - inner)


def _fake(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value, state_output, state_lse = arguments[7:10]
    return (
        value.new_empty(value.shape),
        state_lse.new_empty(*state_lse.shape[:-1], 1),
        state_output.new_empty(state_output.shape),
        state_lse.new_empty(state_lse.shape),
    )


_step = register(
    "decode_step(Tensor query, Tensor query_slots, Tensor query_slot_bias, Tensor key, Tensor key_bias,"
    " Tensor key_slots, Tensor key_slot_bias, Tensor value, Tensor state_output, Tensor state_lse, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    dispatch(torch_kernel, "decode_step", records=((SlotInputs._make, 8), (AttentionState._make, 2)), like=8),
    _fake,
)
