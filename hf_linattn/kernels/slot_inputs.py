"""What goes into attention through slots: tokens, and the two linear maps from tokens to log-weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SlotInputs(NamedTuple):
    """Query t reads key n with the weight `sum_j exp(a[t, j] + c[n, j])`, a sum over slots j, where

        a[t, j] = query_t . query_slots_j + query_slot_bias_j
        c[n, j] = key_n . key_slots_j + key_slot_bias_j + key_bias_n

    A factor of the weights that belongs to a query alone only shifts its log-sum-exp, and is left to the caller.

    Args:
        query, key: `[batch, heads, ..., tokens, dim]`, already scaled.
        query_slots, key_slots: `[batch or 1, heads, slots, dim]`, or without leading dimensions; their biases without
            `dim`.
        key_bias: `[batch or 1, heads or 1, ..., tokens]`, `-inf` for a key that nothing reads.
        value: `[batch, heads, ..., tokens, head_dim]`.
    """

    query: Tensor
    query_slots: Tensor
    query_slot_bias: Tensor
    key: Tensor
    key_bias: Tensor
    key_slots: Tensor
    key_slot_bias: Tensor
    value: Tensor

    def grouped(self) -> SlotInputs:
        """Batch and heads as one dimension of groups, in all tensors: what the operators take."""
        lead, tokens = self.query.shape[:2], self.query.ndim
        grouped = []
        for x, ndim in zip(self, (tokens, 4, 3, tokens, tokens - 1, 4, 3, tokens), strict=True):
            if x.ndim < ndim:
                x = x[(None,) * (ndim - x.ndim)]
            grouped.append(x.expand(*lead, *x.shape[2:]).flatten(0, 1))
        return SlotInputs(*grouped)

    def in_groups(self, size: int, budget: int) -> list[tuple[slice, SlotInputs]]:
        """Some groups at a time, and which ones they are: as many of `size` as the budget allows, at least one."""
        groups, step = self.query.shape[0], max(1, budget // max(1, size))
        if step >= groups > 0:
            return [(slice(0, groups), self)]
        parts = [slice(start, start + step) for start in range(0, groups, step)]
        return [(part, SlotInputs(*(z[part] for z in self))) for part in parts]
