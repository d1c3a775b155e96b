"""Causal attention through slots without a window: every query reads all keys up to itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..attention_state import AttentionState
from ..backends import current_backend
from ..operators import register_pair
from ..slot_inputs import SlotInputs
from . import torch_kernel


def causal_slot_attention(inputs: SlotInputs, chunk: int) -> AttentionState:
    """What every query reads through slots from the keys up to itself.

    Args:
        inputs: Tokens `[batch, heads, tokens, dim]`, values `[batch, heads, tokens, head_dim]`.
        chunk: Tokens, a power of two, whose keys and queries meet one by one (intra-chunk) rather than through sums
            over keys (inter-chunk).
    Returns: output `[batch, heads, tokens, head_dim]` and its log-sum-exp.
    Cost: O(tokens * slots * (head_dim + chunk)) time; beside inputs and results O(tokens / (16 chunk) * slots *
        head_dim) memory.
    """
    lead = inputs.query.shape[:2]
    output, lse, *_ = _causal_slots(*inputs.grouped(), chunk, current_backend())
    return AttentionState(output.unflatten(0, lead), lse.unflatten(0, lead))


def _kept(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The prefix states that are kept for the backward pass."""
    *_, key_bias, key_slots, _, value, chunk, _ = arguments
    kept = query.shape[0], torch_kernel.kept_states(query.shape[1], chunk), key_slots.shape[1]
    return key_bias.new_empty(*kept, value.shape[-1]), key_bias.new_empty(*kept, 2)


_causal_slots = register_pair(
    "causal(Tensor query, Tensor query_slots, Tensor query_slot_bias, Tensor key, Tensor key_bias, Tensor key_slots,"
    " Tensor key_slot_bias, Tensor value, int chunk) -> (Tensor output, Tensor lse, Tensor sums, Tensor masses)",
    torch_kernel,
    record=SlotInputs,
    kept=_kept,
)
