"""Inter-block attention from its two parts, attention and a scan, in either implementation.

Every unit of keys is summarised by a state per slot, the states are merged over the units that a block of queries
reads, and the queries read the merged states. States of all units are as large as `units * slots` keys. They are never
kept: they are computed again in the backward pass, and for some groups at a time, so that they stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..attention_state import AttentionState
from ..slot_inputs import SlotInputs
from .reach import BlockReach

# Elements of the states that are computed at a time (at least those of one group).
_STATES = {"cpu": 1 << 22}
_MORE_STATES = 1 << 29


class InterBlock(NamedTuple):
    """The kernels `attend` and `scan` of one implementation, and what is made of them.

    Tensors of `SlotInputs` have one dimension of groups; queries are `[groups, blocks, queries, dim]`, keys `[groups,
    units, keys, dim]`. A reach is a list of the fields of `BlockReach`.
    """

    attend_forward: Callable[..., tuple[Tensor, Tensor]]
    attend_backward: Callable[..., Any]
    scan_forward: Callable[..., tuple[Tensor, Tensor]]
    scan_backward: Callable[..., tuple[Tensor, Tensor]]

    def forward(self, inputs: SlotInputs, reach: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Output `[groups, blocks, queries, head_dim]` and its log-sum-exp."""
        output = inputs.value.new_empty(*inputs.query.shape[:-1], inputs.value.shape[-1])
        lse = inputs.key_bias.new_empty(inputs.query.shape[:-1])
        size = inputs.key.shape[1] * inputs.key_slots.shape[1] * inputs.value.shape[-1]  # of a group's states
        units, margin, is_causal = reach
        for part, group in inputs.in_groups(size, _STATES.get(inputs.key.device.type, _MORE_STATES)):
            states, state_lse, _ = self._states(group)
            blocks = group.query.shape[1]
            merged, merged_lse = self.scan_forward(
                states, state_lse, blocks, BlockReach(units, margin, bool(is_causal))
            )
            slots = group.query_slots.unsqueeze(1).expand(-1, blocks, -1, -1)
            merged_lse = merged_lse + group.query_slot_bias.unsqueeze(1)
            output[part], lse[part] = self.attend_forward(group.query, slots, merged, merged_lse, None)
        return output, lse

    def backward(
        self,
        grads: AttentionState,
        inputs: SlotInputs,
        results: Sequence[Tensor],
        needs: Sequence[bool],
        reach: Sequence[int],
    ) -> list[Tensor | None]:
        """Gradients of the eight tensors, where `needs` says so."""
        found = [z.new_empty(z.shape) if needed else None for z, needed in zip(inputs, needs, strict=True)]
        size = inputs.key.shape[1] * inputs.key_slots.shape[1] * inputs.value.shape[-1]
        units, margin, is_causal = reach
        for part, group in inputs.in_groups(size, _STATES.get(inputs.key.device.type, _MORE_STATES)):
            upstream = AttentionState(grads.output[part], grads.lse[part])
            result = AttentionState(results[0][part], results[1][part])
            of_group = self._backward_of(group, upstream, result, needs, BlockReach(units, margin, bool(is_causal)))
            for total, grad in zip(found, of_group, strict=True):
                if total is not None and grad is not None:
                    total[part] = grad
        return found

    def _states(self, inputs: SlotInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Output and log-sum-exp of every slot and unit, and the log-sum-exp without the bias of the slots."""
        slots = inputs.key_slots.unsqueeze(1).expand(-1, inputs.key.shape[1], -1, -1)
        output, lse = self.attend_forward(slots, inputs.key, inputs.value, inputs.key_bias, None)
        return output, lse + inputs.key_slot_bias.unsqueeze(1), lse

    def _backward_of(
        self,
        inputs: SlotInputs,
        grads: AttentionState,
        result: AttentionState,
        needs: Sequence[bool],
        reach: BlockReach,
    ) -> list[Tensor | None]:
        states, state_lse, plain_lse = self._states(inputs)
        blocks, units = inputs.query.shape[1], inputs.key.shape[1]
        merged, merged_lse = self.scan_forward(states, state_lse, blocks, reach)
        slots = inputs.query_slots.unsqueeze(1).expand(-1, blocks, -1, -1)
        bias = inputs.query_slot_bias.unsqueeze(1)
        key_side = any(needs[3:])
        wanted = [needs[0], needs[1], key_side, key_side or needs[2]]
        reading = (*grads, inputs.query, slots, merged, merged_lse + bias, None, *result)
        query, query_slots, grad_merged, grad_bias = self.attend_backward(*reading, wanted)
        found = [query, None if query_slots is None else query_slots.sum(1), grad_bias.sum(1) if needs[2] else None]
        if not key_side:
            return [*found, None, None, None, None, None]
        grad_states, grad_state_lse = self.scan_backward(
            grad_merged, grad_bias, states, state_lse, merged, merged_lse, reach
        )
        del reading, merged, grad_merged  # as large as the states
        slots = inputs.key_slots.unsqueeze(1).expand(-1, units, -1, -1)
        wanted = [needs[5], needs[3], needs[7], needs[4]]
        writing = (grad_states, grad_state_lse, slots, inputs.key, inputs.value, inputs.key_bias, None)
        key_slots, key, value, key_bias = self.attend_backward(*writing, states, plain_lse, wanted)
        slot_bias = grad_state_lse.sum(1) if needs[6] else None
        return [*found, key, key_bias, None if key_slots is None else key_slots.sum(1), slot_bias, value]
