"""Inter-block attention through slots: blocks of queries read units of keys before and after them, not their own."""

from __future__ import annotations

from ..attention_state import AttentionState
from ..backends import current_backend
from ..operators import register_pair
from ..slot_inputs import SlotInputs
from . import torch_kernel
from .inter_block import BlockReach


def block_slot_attention(inputs: SlotInputs, reach: BlockReach) -> AttentionState:
    """What every query reads through slots from the units of keys that its block reaches.

    Args:
        inputs: Queries `[batch, heads, blocks, queries, dim]`, keys `[batch, heads, units, keys, dim]`, values
            `[batch, heads, units, keys, head_dim]`.
        reach: Which units a block reads.
    Returns: output `[batch, heads, blocks, queries, head_dim]` and its log-sum-exp.
    Cost: O((queries + keys) * slots * head_dim) time, and for each group (row and head) at a time O(units * slots *
        head_dim) memory.
    """
    lead = inputs.query.shape[:2]
    options = [reach.units, reach.margin, int(reach.is_causal)]
    output, lse = _block_slots(*inputs.grouped(), options, current_backend())
    return AttentionState(output.unflatten(0, lead), lse.unflatten(0, lead))


_block_slots = register_pair(
    "blocks(Tensor query, Tensor query_slots, Tensor query_slot_bias, Tensor key, Tensor key_bias, Tensor key_slots,"
    " Tensor key_slot_bias, Tensor value, int[] reach) -> (Tensor output, Tensor lse)",
    torch_kernel,
    record=SlotInputs,
)
