"""One token of generation through slots: the key joins every slot, then the query reads. A state of constant size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from ..attention_state import AttentionState, merge_states
from ..backend import current_backend, runs_on_triton
from ..operators import register


class Decoded(NamedTuple):
    """What the query reads (`[..., head_dim]`, `[...]`), and the slots after this token, float32."""

    output: Tensor
    lse: Tensor
    state_output: Tensor
    state_mass: Tensor


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
) -> Decoded:
    """One step of causal attention through slots, with log-weights that are linear in the token.

    The token's weight for slot j is `exp(key . key_slots_j + key_bias + key_slot_bias_j)`; the query's is the same
    with its own slots, times the mass of the slot, this token included.

    Args:
        query, key: `[..., dim]`, already scaled; query_bias, key_bias: `[...]`, `-inf` for a key that is not to be
            seen (the state stays as it is). value: `[..., head_dim]`.
        query_slots, key_slots: `[..., slots, dim]`; their biases `[..., slots]`. Leading dimensions broadcast: slots
            that all rows share are not copied.
        state_output: `[..., slots, head_dim]`, state_mass: `[..., slots]`. Before the first token 0 and `-inf`.
    Returns: the output in the dtype of `value`, everything else in that of the state. The given state is not changed.
    Raises: UnsupportedError where gradients are asked for (there are none), InputError if the state is not float32
        (or float64, in portable torch).
    Cost: O(slots * (dim + head_dim)) time and memory, whatever came before.
    """
    lead = state_mass.shape[:-1]
    slots = (query_slots, query_slot_bias, key_slots, key_slot_bias)
    inputs = (query, query_bias, key, key_bias, value, *slots, state_output, state_mass)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise UnsupportedError("decode_step has no gradients. Use torch.no_grad(), or attention over whole sequences.")
    for name, state in (("state_output", state_output), ("state_mass", state_mass)):
        if state.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{name} must be float32: small sums would be lost in {state.dtype}. Keep it in float32.")
    if not (value.is_cuda or current_backend() == "triton"):  # plain torch, which a compiler can fuse
        return Decoded(*_step(*inputs))
    inner = (1, 0, 1, 0, 1, 2, 1, 2, 1, 2, 1)
    found = _step_op(*[_fold(t, lead, n) for t, n in zip(inputs, inner, strict=True)], current_backend())
    return Decoded(*[t.reshape(*lead, *t.shape[2:]) for t in found])


def _fold(x: Tensor, lead: torch.Size, inner: int) -> Tensor:
    """`[..., *inner]` as `[batch, heads, *inner]`, without writing out what is shared by the batch."""
    x = x.expand(*lead, *x.shape[x.ndim - inner :])
    while len(lead) < 2:
        lead, x = torch.Size([1, *lead]), x.unsqueeze(0)
    return x.reshape(-1, lead[-1], *x.shape[x.ndim - inner :])


def _step(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`decode_step` in torch."""
    query, query_bias, key, key_bias, value, query_slots, query_slot_bias, key_slots, key_slot_bias = inputs[:9]
    state = AttentionState(*inputs[9:])
    wide = state.output.dtype

    def log_weights(token: Tensor, bias: Tensor, slots: Tensor, slot_bias: Tensor) -> Tensor:
        products = (slots.to(wide) * token.to(wide).unsqueeze(-2)).sum(-1)
        return products + bias.to(wide).unsqueeze(-1) + slot_bias.to(wide)

    mass = log_weights(key, key_bias, key_slots, key_slot_bias)
    state = merge_states([state, AttentionState(value.to(wide).unsqueeze(-2).expand_as(state.output), mass)])
    logits = log_weights(query, torch.zeros_like(query_bias), query_slots, query_slot_bias) + state.lse
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    output = (weights.unsqueeze(-1) * state.output).sum(-2) / total.masked_fill(total == 0, 1.0)
    return output.to(value.dtype), (total.log() + top).squeeze(-1) + query_bias.to(wide), state.output, state.lse


def _kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, backend = arguments
    if runs_on_triton(backend, inputs[9]):
        from . import triton_kernel as _triton

        return _triton.decode_step(*inputs)
    output, lse, *state = (z.contiguous() for z in _step(*inputs))
    return output, lse, state[0], state[1]


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value, state_output, state_mass = arguments[4], arguments[9], arguments[10]
    return (
        value.new_empty(value.shape),
        state_mass.new_empty(state_mass.shape[:-1]),
        state_output.new_empty(state_output.shape),
        state_mass.new_empty(state_mass.shape),
    )


_step_op = register(
    "decode_step(Tensor query, Tensor query_bias, Tensor key, Tensor key_bias, Tensor value, Tensor query_slots,"
    " Tensor query_slot_bias, Tensor key_slots, Tensor key_slot_bias, Tensor state_output, Tensor state_mass,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)
