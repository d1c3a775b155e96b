"""Inter-block attention from its two parts, attention and a scan, in either implementation.

Every unit of keys is summarised by a state per slot, the states are merged over the units that a block of queries
reads, and the queries read the merged states. States of all units are as large as `units * slots` keys. They are never
kept: they are computed again in the backward pass, and for some groups at a time, so that they stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..attention_state import AttentionState
from ..slot_inputs import SlotInputs

# Elements of the states that are computed at a time (at least those of one group).
_STATES = {"cpu": 1 << 22}
_MORE_STATES = 1 << 29


class BlockReach(NamedTuple):
    """Block t covers the units `t * units .. (t + 1) * units - 1`. It reads those below `t * units - margin` and,
    unless causal, those from `(t + 1) * units + margin` on.

    units: Units of keys per block of queries.
    margin: Units next to a block that it does not read either (its window covers them).
    is_causal: Only units before are read, and only the ones to the left have a margin.
    """

    units: int = 1
    margin: int = 0
    is_causal: bool = False


class InterBlock(NamedTuple):
    """The kernels `attend` and `scan` of one implementation, and what is made of them.

    Tensors of `SlotInputs` have one dimension of groups; queries are `[groups, blocks, queries, dim]`, keys `[groups,
    units, keys, dim]`. A reach is a `BlockReach` or a list of its fields.
    """

    attend_forward: Callable[..., tuple[Tensor, Tensor]]
    attend_backward: Callable[..., Any]
    scan_forward: Callable[..., tuple[Tensor, Tensor]]
    scan_backward: Callable[..., tuple[Tensor, Tensor]]

    def forward(self, inputs: SlotInputs, reach: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Output `[groups, blocks, queries, head_dim]` and its log-sum-exp."""
        output = inputs.value.new_empty(*inputs.query.shape[:-1], inputs.value.shape[-1])
        lse = inputs.key_bias.new_empty(inputs.query.shape[:-1])
        for part, group in _some_groups(inputs):
            *_, merged = self._states(group, BlockReach._make(reach))
            slots, bias = _for_each(group.query, group.query_slots), group.query_slot_bias.unsqueeze(1)
            output[part], lse[part] = self.attend_forward(group.query, slots, merged.output, merged.lse + bias, None)
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
        for part, group in _some_groups(inputs):
            upstream = AttentionState(grads.output[part], grads.lse[part])
            result = AttentionState(results[0][part], results[1][part])
            of_group = self._backward_of(group, upstream, result, needs, BlockReach._make(reach))
            for total, grad in zip(found, of_group, strict=True):
                if total is not None and grad is not None:
                    total[part] = grad
        return found

    def _states(self, inputs: SlotInputs, reach: BlockReach) -> tuple[AttentionState, Tensor, AttentionState]:
        """States of the units, their log-sum-exps with the bias of the slots, and the states that each block reads."""
        slots, bias = _for_each(inputs.key, inputs.key_slots), inputs.key_slot_bias.unsqueeze(1)
        units = AttentionState(*self.attend_forward(slots, inputs.key, inputs.value, inputs.key_bias, None))
        unit_lse = units.lse + bias
        merged = self.scan_forward(units.output, unit_lse, inputs.query.shape[1], reach)
        return units, unit_lse, AttentionState(*merged)

    def _backward_of(
        self,
        inputs: SlotInputs,
        grads: AttentionState,
        result: AttentionState,
        needs: Sequence[bool],
        reach: BlockReach,
    ) -> list[Tensor | None]:
        units, unit_lse, merged = self._states(inputs, reach)
        key_side = any(needs[3:])
        wanted = [needs[0], needs[1], key_side, key_side or needs[2]]
        slots, bias = _for_each(inputs.query, inputs.query_slots), inputs.query_slot_bias.unsqueeze(1)
        reading = (*grads, inputs.query, slots, merged.output, merged.lse + bias, None, *result)
        query, query_slots, grad_merged, grad_bias = self.attend_backward(*reading, wanted)
        found = [query, None if query_slots is None else query_slots.sum(1), grad_bias.sum(1) if needs[2] else None]
        if not key_side:
            return [*found, None, None, None, None, None]
        grad_states = self.scan_backward(grad_merged, grad_bias, units.output, unit_lse, *merged, reach)
        del reading, merged, grad_merged  # as large as the states
        slots = _for_each(inputs.key, inputs.key_slots)
        wanted = [needs[5], needs[3], needs[7], needs[4]]
        writing = (*grad_states, slots, inputs.key, inputs.value, inputs.key_bias, None, *units)
        key_slots, key, value, key_bias = self.attend_backward(*writing, wanted)
        slot_bias = grad_states[1].sum(1) if needs[6] else None
        return [*found, key, key_bias, None if key_slots is None else key_slots.sum(1), slot_bias, value]


def _some_groups(inputs: SlotInputs) -> Iterable[tuple[slice, SlotInputs]]:
    """So many groups at a time that the states of their units are within the limit."""
    size = inputs.key.shape[1] * inputs.key_slots.shape[1] * inputs.value.shape[-1]
    return inputs.in_groups(size, _STATES.get(inputs.key.device.type, _MORE_STATES))


def _for_each(tokens: Tensor, slots: Tensor) -> Tensor:
    """`[groups, slots, dim]` for every block or unit of `tokens`: `[groups, blocks, slots, dim]`."""
    return slots.unsqueeze(1).expand(-1, tokens.shape[1], -1, -1)
