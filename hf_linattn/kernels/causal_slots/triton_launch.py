"""Causal attention through slots without a window, in Triton: states of chunks, their scan, and the chunk itself.

Keys of earlier chunks are read through merged states of slots, those of the query's own chunk by `near`; both are one
softmax, so that the gradients of either part follow from the joint output and log mass. States are as large as
`tokens / chunk * slots` keys. They are computed for some groups at a time and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attend.triton_launch import attend_backward, attend_forward
from ..attention_state import AttentionState, merge_states
from ..block_slots.reach import BlockReach
from ..block_slots.triton_kernel import scan_backward, scan_forward
from .triton_intra_chunk import near_backward, near_forward

# Tokens of a chunk of the kernels, whatever the caller's chunk is: the result is the same.
_CHUNK = 64
_KEPT = 16  # as in the portable form, whose states in between these kernels have no use for
# Elements of the states that are computed at a time (at least those of one group).
_STATES = 1 << 29
_BEFORE = BlockReach(is_causal=True)


class _Inputs(NamedTuple):
    """The eight inputs; tokens a multiple of `_CHUNK`."""

    query: Tensor
    query_slots: Tensor
    query_slot_bias: Tensor
    key: Tensor
    key_bias: Tensor
    key_slots: Tensor
    key_slot_bias: Tensor
    value: Tensor

    def padded(self) -> _Inputs:
        extra = -self.query.shape[1] % _CHUNK
        if not extra:
            return self
        longer = {name: F.pad(getattr(self, name), (0, 0, 0, extra)) for name in ("query", "key", "value")}
        longer["key_bias"] = F.pad(self.key_bias, (0, extra), value=float("-inf"))
        return self._replace(**longer)

    def some(self) -> Iterator[tuple[slice, _Inputs]]:
        """A few groups at a time."""
        chunks, slots = self.query.shape[1] // _CHUNK, self.key_slots.shape[1]
        step = max(1, _STATES // max(1, chunks * slots * self.value.shape[-1]))
        for start in range(0, self.query.shape[0], step):
            group = slice(start, start + step)
            yield group, _Inputs(*(z[group] for z in self))

    def cut(self, x: Tensor) -> Tensor:
        """`[groups, tokens, ...]` -> `[groups, chunks, tokens of a chunk, ...]`."""
        return x.unflatten(1, (-1, _CHUNK))

    def shared(self, slots: Tensor) -> Tensor:
        """`[groups, slots, dim]` -> `[groups, chunks, slots, dim]`."""
        return slots.unsqueeze(1).expand(-1, self.query.shape[1] // _CHUNK, -1, -1)

    def states(self) -> tuple[Tensor, Tensor]:
        """Every chunk's keys as the slots read them, without the bias of the slots."""
        keys, bias, values = self.cut(self.key), self.cut(self.key_bias), self.cut(self.value)
        return attend_forward(self.shared(self.key_slots), keys, values, bias, None)

    def merged(self, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The states of all chunks before each; their log masses without and with the bias of the reading slots."""
        mass = states[1] + self.key_slot_bias.unsqueeze(1)
        output, mass = scan_forward(states[0], mass, mass.shape[1], _BEFORE)
        return output, mass, mass + self.query_slot_bias.unsqueeze(1)


def causal_forward(
    query: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    key: Tensor,
    key_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    value: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and log mass of every query; arguments as `kernels.causal.causal`, rows and heads one dimension.

    The last two results are the place of the states that the portable form keeps, here without content.
    """
    given = _Inputs(query, query_slots, query_slot_bias, key, key_bias, key_slots, key_slot_bias, value)
    groups, tokens, _ = query.shape
    output = value.new_empty(groups, tokens, value.shape[-1])
    lse = output.new_empty(groups, tokens, dtype=torch.float32)
    for group, few in given.padded().some():
        merged, _, mass = few.merged(few.states())
        far = attend_forward(few.cut(few.query), few.shared(few.query_slots), merged, mass, None)
        near = near_forward(*few, _CHUNK)
        both = merge_states([AttentionState(far[0].flatten(1, 2), far[1].flatten(1, 2)), AttentionState(*near)])
        output[group], lse[group] = both.output[:, :tokens], both.lse[:, :tokens]
    kept = (groups, -(-tokens // (chunk * _KEPT)), key_slots.shape[1])
    nothing = lse.new_zeros(1)
    sums, masses = nothing.expand(*kept, value.shape[-1]), nothing.expand(*kept, 2)
    return output, lse, sums.contiguous(), masses.contiguous()


def causal_backward(
    grad_output: Tensor,
    grad_mass: Tensor,
    query: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    key: Tensor,
    key_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    sums: Tensor,
    masses: Tensor,
    needs: Sequence[bool],
    chunk: int,
) -> list[Tensor | None]:
    """Gradients of the eight tensors of `causal_forward`, where `needs` says so. `sums`, `masses`, `chunk`: unused."""
    given = _Inputs(query, query_slots, query_slot_bias, key, key_bias, key_slots, key_slot_bias, value)
    tokens, extra = query.shape[1], -query.shape[1] % _CHUNK
    grad_output, output = (F.pad(z, (0, 0, 0, extra)) for z in (grad_output, output))
    grad_mass, lse = F.pad(grad_mass, (0, extra)), F.pad(lse, (0, extra), value=float("-inf"))
    found = [z.new_empty(z.shape) if needed else None for z, needed in zip(given, needs, strict=True)]
    for group, few in given.padded().some():
        results = grad_output[group], grad_mass[group], output[group], lse[group]
        near = near_backward(*results[:2], *few, *results[2:], needs, _CHUNK)
        far = _through_states(few, *results, needs)
        for total, one, other in zip(found, near, far, strict=True):
            if total is not None and one is not None:
                both = one if other is None else one + other
                total[group] = both[:, :tokens] if both.shape[1] != total.shape[1] else both
    return found


def _through_states(
    few: _Inputs, grad_output: Tensor, grad_mass: Tensor, output: Tensor, lse: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of what queries read from earlier chunks."""
    states = few.states()
    merged, merged_mass, mass = few.merged(states)
    key_side = any(needs[3:])
    grads = attend_backward(
        few.cut(grad_output),
        few.cut(grad_mass),
        few.cut(few.query),
        few.shared(few.query_slots),
        merged,
        mass,
        None,
        few.cut(output),
        few.cut(lse),
        (needs[0], needs[1], key_side, key_side or needs[2]),
    )
    found: list[Tensor | None] = [None] * 8
    found[0] = None if grads[0] is None else grads[0].flatten(1, 2)
    found[1] = None if grads[1] is None else grads[1].sum(1)
    found[2] = grads[3].sum(1) if needs[2] and grads[3] is not None else None
    if not key_side or grads[2] is None or grads[3] is None:
        return found
    own_mass = states[1] + few.key_slot_bias.unsqueeze(1)
    grad_states, grad_own = scan_backward(grads[2], grads[3], states[0], own_mass, merged, merged_mass, _BEFORE)
    key_slots, keys, values, bias = attend_backward(
        grad_states,
        grad_own,
        few.shared(few.key_slots),
        few.cut(few.key),
        few.cut(few.value),
        few.cut(few.key_bias),
        None,
        states[0],
        states[1],
        (needs[5], needs[3], needs[7], needs[4]),
    )
    found[3], found[4], found[7] = (None if z is None else z.flatten(1, 2) for z in (keys, bias, values))
    found[5] = None if key_slots is None else key_slots.sum(1)
    found[6] = grad_own.sum(1) if needs[6] else None
    return found
