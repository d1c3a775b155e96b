r"""Causal attention through slots in plain torch: chunk after chunk, sums over earlier keys are the prefix state.

Query t reads key n <= t with weight `sum_j exp(a[t, j] + c[j, n])`. With a reference `m_j` for every slot this is a
product of features `exp(a + m - s)` and `exp(c - m)`, so that a chunk needs the state

    sums S_j = sum_n exp(c[j, n] - m_j) v_n        mass z_j = sum_n exp(c[j, n] - m_j)

of the keys before it and the products inside it. `m_j` is the running maximum of `c`: nothing overflows. It may be
that of a key which some queries of the chunk do not see yet. Where this could make what they do see underflow
(`_safe_top`), the chunk is cut in two; a chunk of one token is always safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..slot_inputs import SlotInputs

# Elements of the logits of a chunk, of some rows and heads, per thread.
_TILE = {"cpu": 1 << 16}
_LARGE_TILE = 1 << 25
# A state is kept for the backward pass every so many chunks; those in between are computed again.
_SEGMENT = 16
# Places in `SlotInputs` of what all tokens share: gradients are summed over them.
_SLOTS = (1, 2, 5, 6)


class _State(NamedTuple):
    """`[groups, slots, head_dim]` and twice `[groups, slots, 1]`; `top` is the lowest number before the first key."""

    sums: Tensor
    mass: Tensor
    top: Tensor


class _Keys(NamedTuple):
    """The keys of a chunk (or of a part of one), relative to the references of `before`."""

    part: slice
    features: Tensor  # `[groups, slots, tokens]`, at most 1
    before: _State  # the keys before the chunk
    decay: Tensor  # what their state was multiplied with, to be relative to the same references


class _Queries(NamedTuple):
    """The queries of a chunk: their weights are `exp(top)` times these."""

    features: Tensor  # `[groups, tokens, slots]`, at most 1
    product: Tensor  # with the keys of the chunk, `[groups, tokens, tokens]`, 0 for later ones
    top: Tensor  # `[groups, tokens, 1]`

    def total(self, before: _State) -> Tensor:
        """The sum of a query's weights, of the keys before the chunk and in it, `[groups, tokens, 1]`."""
        return (self.features @ before.mass).add_(self.product.sum(-1, keepdim=True))


def causal_forward(inputs: SlotInputs, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and log-sum-exp of every query, and states at some chunks for the backward pass.

    Args: as `causal_slot_attention`, with batch and heads as one dimension of groups.
    Returns: `[groups, tokens, head_dim]`, `[groups, tokens]`, `[groups, kept, slots, head_dim]` and `[groups, kept,
        slots, 2]`.
    """
    (groups, tokens, _), slots, head_dim = inputs.query.shape, inputs.key_slots.shape[1], inputs.value.shape[-1]
    kept, wide = kept_states(tokens, chunk), inputs.key_bias
    output, lse = inputs.value.new_empty(groups, tokens, head_dim), wide.new_empty(groups, tokens)
    sums, masses = wide.new_empty(groups, kept, slots, head_dim), wide.new_empty(groups, kept, slots, 2)
    for part, group in _some_groups(inputs, chunk):
        state = _empty_state(group)
        for number, start in enumerate(range(0, tokens, chunk)):
            if number % _SEGMENT == 0:
                sums[part, number // _SEGMENT] = state.sums
                masses[part, number // _SEGMENT] = torch.cat(state[1:], -1)
            stop = min(start + chunk, tokens)
            for keys, after in _safe_parts(group, slice(start, stop), state):
                _write_outputs(group, keys, output[part], lse[part])
                state = after
    return output, lse, sums, masses


def causal_backward(
    grads: AttentionState, inputs: SlotInputs, results: Sequence[Tensor], needs: Sequence[bool], chunk: int
) -> list[Tensor | None]:
    """Gradients of the eight tensors of `inputs`, where `needs` says so: the chunks in reverse order.

    Args:
        grads: Of output and log-sum-exp. results: All four of `causal_forward`. The log-sum-exp only says which
            queries see nothing: weights are normalised by their sums, which are computed again.
    """
    output, lse, sums, masses = results
    found = [
        (torch.zeros if i in _SLOTS else torch.empty)(z.shape, dtype=lse.dtype, device=z.device) if needed else None
        for i, (z, needed) in enumerate(zip(inputs, needs, strict=True))
    ]
    tokens, length = inputs.query.shape[1], chunk * _SEGMENT
    for part, group in _some_groups(inputs, chunk):
        of_group = [None if total is None else total[part] for total in found]
        upstream = AttentionState(grads.output[part], grads.lse[part])
        pass_back = _Backward(group, upstream, output[part], lse[part], of_group)
        for segment in reversed(range(sums.shape[1])):
            mass, top = masses[part, segment].split(1, -1)
            start = segment * length
            state, chunks = _State(sums[part, segment], mass, top), []
            for first in range(start, min(start + length, tokens), chunk):
                for keys, after in _safe_parts(group, slice(first, min(first + chunk, tokens)), state):
                    chunks.append(keys)
                    state = after
            while chunks:
                pass_back.chunk(chunks.pop())
    return [None if grad is None else grad.to(z.dtype) for grad, z in zip(found, inputs, strict=True)]


def kept_states(tokens: int, chunk: int) -> int:
    """How many states are kept for the backward pass."""
    return -(-tokens // (chunk * _SEGMENT))


# -- inputs ----------------------------------------------------------------------------------------------------------


def _some_groups(inputs: SlotInputs, chunk: int) -> list[tuple[slice, SlotInputs]]:
    """So many groups at a time that the logits of a chunk stay in the caches."""
    budget = _TILE["cpu"] * torch.get_num_threads() if inputs.query.device.type == "cpu" else _LARGE_TILE
    return inputs.in_groups(chunk * inputs.key_slots.shape[1], budget)


def _empty_state(inputs: SlotInputs) -> _State:
    groups, slots, _ = inputs.key_slots.shape
    sums = inputs.key_bias.new_zeros(groups, slots, inputs.value.shape[-1])
    mass = sums.new_zeros(groups, slots, 1)
    return _State(sums, mass, torch.full_like(mass, torch.finfo(mass.dtype).min))


# -- one chunk -------------------------------------------------------------------------------------------------------


def _safe_top(c: Tensor, state: _State) -> Tensor | None:
    """The new reference of every slot, `[groups, slots, 1]`; `None` if the chunk has to be cut.

    It is safe if nothing that a query sees can underflow because of the reference of a key that it does not see. A
    query sees the keys before the chunk and its own: the reference may not be far above both. e^-28 of the largest
    weight is below the rounding of float32; float64 has room to spare.
    """
    top = torch.maximum(c.amax(-1, keepdim=True), state.top)
    room = -math.log(torch.finfo(c.dtype).tiny) - 28
    if c.shape[-1] == 1 or bool((top - state.top).amax() <= room):
        return top
    # Padding does not count.
    lowest = c.masked_fill(c == float("-inf"), float("inf")).amin(-1, keepdim=True)
    return top if bool((top - torch.maximum(lowest, state.top)).amax() <= room) else None


def _safe_parts(inputs: SlotInputs, part: slice, state: _State) -> Iterator[tuple[_Keys, _State]]:
    """A chunk in as few parts as is safe, given the state before it; each with the state after it."""
    # Without the bias of the slots, which may as well go to the query's side.
    bias = inputs.key_bias[:, part].unsqueeze(1)
    c = (inputs.key_slots.to(bias.dtype) @ inputs.key[:, part].to(bias.dtype).mT).add_(bias)
    top = _safe_top(c, state)
    if top is None:
        middle = (part.start + part.stop + 1) // 2
        for half in (slice(part.start, middle), slice(middle, part.stop)):
            for keys, after in _safe_parts(inputs, half, state):
                yield keys, after
                state = after
        return
    decay = (state.top - top).exp_()
    before = _State(state.sums * decay, state.mass * decay, top)
    features = c.sub_(top).exp_()
    sums = torch.baddbmm(before.sums, features, inputs.value[:, part].to(inputs.key_bias.dtype))
    yield _Keys(part, features, before, decay), _State(sums, before.mass + features.sum(-1, keepdim=True), top)


def _query_features(inputs: SlotInputs, keys: _Keys) -> _Queries:
    # References are large where keys are long, and similar: what they have in common is added last, to the lse.
    common, wide = keys.before.top.amax(1, keepdim=True), inputs.key_bias.dtype
    slot_bias = (inputs.query_slot_bias + inputs.key_slot_bias).unsqueeze(1)
    features = inputs.query[:, keys.part].to(wide) @ inputs.query_slots.to(wide).mT
    features.add_((keys.before.top - common).mT + slot_bias)
    top = features.amax(-1, keepdim=True)
    features.sub_(top).exp_()
    product = (features @ keys.features).tril_()  # later keys have weight 0
    return _Queries(features, product, top + common)


def _write_outputs(inputs: SlotInputs, keys: _Keys, output: Tensor, lse: Tensor) -> None:
    """Write the results of a chunk."""
    part, before, queries = keys.part, keys.before, _query_features(inputs, keys)
    total = queries.total(before)
    result = torch.baddbmm(
        queries.features @ before.sums, queries.product, inputs.value[:, part].to(inputs.key_bias.dtype)
    )
    empty = total == 0
    total.masked_fill_(empty, 1.0)
    output[:, part] = result.div_(total)
    lse[:, part] = total.log_().add_(queries.top).masked_fill_(empty, float("-inf")).squeeze(-1)


class _Backward:
    """Carries the gradient of the state from later chunks to earlier ones."""

    def __init__(
        self, inputs: SlotInputs, grads: AttentionState, output: Tensor, lse: Tensor, found: list[Tensor | None]
    ) -> None:
        self.inputs, self.found = inputs, found
        # Of a query that sees nothing all weights are 0 anyway, and the gradient of its log-sum-exp may be NaN.
        empty = lse == float("-inf")
        self.grad_output, self.grad_lse, self.output = grads.output, grads.lse.masked_fill(empty, 0.0), output
        self.sums, self.mass, _ = _empty_state(inputs)

    def chunk(self, keys: _Keys) -> None:
        """Gradients of a chunk."""
        part, before, queries = keys.part, keys.before, _query_features(self.inputs, keys)
        values = self.inputs.value[:, part].to(self.inputs.key_bias.dtype)
        grads = self.grad_output[:, part].to(values.dtype)
        shift = (grads * self.output[:, part].to(values.dtype)).sum(-1, keepdim=True)
        shift -= self.grad_lse[:, part].unsqueeze(-1)
        # Everything is linear in features divided by the total of a query.
        total = queries.total(before)
        total.masked_fill_(total == 0, 1.0)
        grads, shift = grads / total, shift / total
        pairs = torch.baddbmm(-shift, grads, values.mT).tril_()  # later keys have weight 0

        grad_query = torch.baddbmm(grads @ before.sums.mT, pairs, keys.features.mT)
        grad_query.addcmul_(shift, before.mass.mT, value=-1).mul_(queries.features)
        grad_key = torch.baddbmm(self.sums @ values.mT, queries.features.mT, pairs).add_(self.mass).mul_(keys.features)
        if self.found[7] is not None:
            _write(self.found[7][:, part], keys.features.mT, self.sums).baddbmm_(queries.product.mT, grads)
        self._add((0, None, 1, 2), grad_query, part, of_keys=False)
        self._add((3, 4, 5, 6), grad_key, part, of_keys=True)

        self.sums = torch.baddbmm(self.sums, queries.features.mT, grads).mul_(keys.decay)
        self.mass = self.mass.sub((queries.features * shift).sum(1).unsqueeze(-1)).mul_(keys.decay)

    def _add(self, which: tuple[int, int | None, int, int], grad: Tensor, part: slice, *, of_keys: bool) -> None:
        """Add what follows from the gradients of logits to those of tokens, their bias, slots and their bias."""
        tokens, bias, slots, slot_bias = (None if i is None else self.found[i] for i in which)
        given_tokens, given_slots = self.inputs[which[0]], self.inputs[which[2]]
        by_token = grad.mT if of_keys else grad
        if tokens is not None:
            _write(tokens[:, part], by_token, given_slots.to(grad.dtype))
        if bias is not None:
            torch.sum(by_token, -1, out=bias[:, part])
        if slots is not None:
            slots += by_token.mT @ given_tokens[:, part].to(grad.dtype)
        if slot_bias is not None:
            slot_bias += by_token.sum(1)


def _write(place: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` into a part of a tensor that may not be initialised."""
    return torch.baddbmm(place, left, right, beta=0, out=place)
