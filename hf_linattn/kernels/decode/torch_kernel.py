"""`decode_step` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_state import AttentionState, merge_states
from ..slot_inputs import SlotInputs


def decode_step(inputs: SlotInputs, state: AttentionState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output `[..., 1, head_dim]` and log-sum-exp `[..., 1]` of the query, and the two parts of the state."""
    wide = state.output.dtype
    gained = _log_weights(inputs.key, inputs.key_slots, inputs.key_slot_bias, wide) + inputs.key_bias.to(wide)
    value = inputs.value.to(wide).expand_as(state.output)
    state = merge_states([state, AttentionState(value, gained)])
    logits = _log_weights(inputs.query, inputs.query_slots, inputs.query_slot_bias, wide) + state.lse
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    output = (weights.unsqueeze(-1) * state.output).sum(-2, keepdim=True)
    output = output / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    results = (output.to(inputs.value.dtype), total.log() + top, *state)
    output, lse, state_output, state_lse = (z.contiguous() for z in results)
    return output, lse, state_output, state_lse


def _log_weights(token: Tensor, slots: Tensor, slot_bias: Tensor, wide: torch.dtype) -> Tensor:
    """`token . slots + slot_bias` of one token, `[..., slots]`."""
    return (slots.to(wide) * token.to(wide)).sum(-1) + slot_bias.to(wide)
