r"""Causal attention through slots in plain torch: chunk after chunk, sums over earlier keys are the prefix state.

Query t reads key n <= t with weight `sum_j exp(a[t, j] + c[j, n])`. With a reference `m_j` for every slot this is a
product of features `F[t, j] = exp(a + m - s)` and `G[n, j] = exp(c - m)`, so that a chunk needs the state

    sums S_j = sum_n exp(c[j, n] - m_j) v_n        mass z_j = sum_n exp(c[j, n] - m_j)

of the keys before it and the products inside it. With `V` the values and a column of ones, and `S` the sums and the
mass, all the products of a chunk are, from the first chunk to the last,

    R = F S + A V,  A = lower triangle of F G^T        S <- S + G^T V        output and total are the columns of R

and in the backward pass, with `d` the gradients of the output and the shift `-(d . output - d lse)` as one more
column, both divided by the total, and `P` the lower triangle of `d V^T`,

    dF = d S^T + P G    S <- S + G^T V         from the first chunk of a segment to the last, and
    dG = V U^T + P^T F    dV = G U + A^T d    U <- U + F^T d        from the last to the first.

Gradients of log-weights are those of features times the features. Only products with `S` and `U` wait for each other;
all others are computed for a segment of chunks at a time. Its tokens share the references (`pieces`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..slot_inputs import SlotInputs
from .pieces import Maps, Memory, Piece, pieces

# Features of keys of a segment, of some groups (rows and heads), per thread.
_TILE = {"cpu": 1 << 19}
_LARGE_TILE = 1 << 25
# Chunks of a segment. The state before each is kept for the backward pass; those within are computed again.
_SEGMENT = 8
# Places in `SlotInputs` of what all tokens share: gradients are summed over them.
_SLOTS = (1, 2, 5, 6)


def causal_forward(inputs: SlotInputs, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and log-sum-exp of every query, and states at some chunks for the backward pass.

    Args: as `causal_slot_attention`, with batch and heads as one dimension of groups.
    Returns: `[groups, tokens, head_dim]`, `[groups, tokens]`, `[groups, kept, slots, head_dim]` and `[groups, kept,
        slots, 2]`: sums, mass and reference.
    """
    (groups, tokens, _), slots, head_dim = inputs.query.shape, inputs.key_slots.shape[1], inputs.value.shape[-1]
    kept, wide = kept_states(tokens, chunk), inputs.key_bias
    output, lse = inputs.value.new_empty(groups, tokens, head_dim), wide.new_empty(groups, tokens)
    sums, masses = wide.new_empty(groups, kept, slots, head_dim), wide.new_empty(groups, kept, slots, 2)
    for part, group in _some_groups(inputs, chunk):
        memory = Memory(wide)
        maps = Maps(group, memory)
        state = memory.with_column("state", wide.new_zeros(*maps.bias.shape, head_dim), 0.0, filled=True)
        top = torch.full_like(maps.bias, torch.finfo(wide.dtype).min)  # the lowest number
        for number, where in enumerate(_segments(tokens, chunk)):
            sums[part, number] = state[..., :head_dim]
            masses[part, number, :, 0], masses[part, number, :, 1] = state[..., head_dim], top
            for piece in pieces(group, maps, where, chunk, top, memory):
                _write_outputs(group, piece, state.mul_(piece.decay.unsqueeze(-1)), output[part], lse[part])
                top = piece.top
    return output, lse, sums, masses


def causal_backward(
    grads: AttentionState, inputs: SlotInputs, results: Sequence[Tensor], needs: Sequence[bool], chunk: int
) -> list[Tensor | None]:
    """Gradients of the eight tensors of `inputs`, where `needs` says so: the segments in reverse order.

    Args:
        grads: Of output and log-sum-exp. results: All four of `causal_forward`. The log-sum-exp only says which
            queries see nothing: weights are normalised by their sums, which are computed again.
    """
    output, lse, sums, masses = results
    found = [
        (torch.zeros if i in _SLOTS else torch.empty)(z.shape, dtype=lse.dtype, device=z.device) if needed else None
        for i, (z, needed) in enumerate(zip(inputs, needs, strict=True))
    ]
    segments = _segments(inputs.query.shape[1], chunk)
    for part, group in _some_groups(inputs, chunk):
        of_group = [None if total is None else total[part] for total in found]
        upstream = AttentionState(grads.output[part], grads.lse[part])
        pass_back = _Backward(group, upstream, output[part], lse[part], of_group)
        for number in reversed(range(len(segments))):
            mass, top = masses[part, number].unbind(-1)
            state = torch.cat([sums[part, number], mass.unsqueeze(-1)], -1).mT.contiguous()
            pass_back.segment(segments[number], chunk, state, top)
    return [None if grad is None else grad.to(z.dtype) for grad, z in zip(found, inputs, strict=True)]


def kept_states(tokens: int, chunk: int) -> int:
    """How many states are kept for the backward pass."""
    return -(-tokens // (chunk * _SEGMENT))


def _segments(tokens: int, chunk: int) -> list[slice]:
    length = chunk * _SEGMENT
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def _some_groups(inputs: SlotInputs, chunk: int) -> list[tuple[slice, SlotInputs]]:
    """So many groups at a time that what is computed of a segment stays in the caches."""
    budget = _TILE["cpu"] * torch.get_num_threads() if inputs.query.device.type == "cpu" else _LARGE_TILE
    tokens = min(inputs.query.shape[1], chunk * _SEGMENT)
    return inputs.in_groups(tokens * inputs.key_slots.shape[1], budget)


def _write_outputs(inputs: SlotInputs, piece: Piece, state: Tensor, output: Tensor, lse: Tensor) -> None:
    """Write the results of a piece; `state`, `[groups, slots, columns]`, becomes that of the tokens after."""
    where, head_dim = piece.where, output.shape[-1]
    value = piece.memory.with_column("value", inputs.value[:, where], 1.0, filled=True)
    result = piece.memory.empty("result", *value.shape)
    chunks = (piece.chunks(z) for z in (result, piece.queries, piece.keys, value))
    for of_chunk, queries, keys, values in zip(*chunks, strict=True):
        torch.bmm(queries, state, out=of_chunk)
        state.baddbmm_(keys.mT, values)
    piece.joined(result).baddbmm_(piece.pairs, piece.joined(value))
    total = result[..., head_dim : head_dim + 1].contiguous()
    empty = total == 0
    total.masked_fill_(empty, 1.0)
    torch.div(result[..., :head_dim], total, out=output[:, where])
    lse[:, where] = total.log_().add_(piece.query_top).masked_fill_(empty, float("-inf")).squeeze(-1)


class _Backward:
    """Carries the gradient of the state, `after`, from later segments to earlier ones.

    States are transposed here, `[groups, head_dim + 1, slots]`.
    """

    def __init__(
        self, inputs: SlotInputs, grads: AttentionState, output: Tensor, lse: Tensor, found: list[Tensor | None]
    ) -> None:
        self.inputs, self.found = inputs, found
        # Of a query that sees nothing all weights are 0 anyway, and the gradient of its log-sum-exp may be NaN.
        empty = lse == float("-inf")
        self.grad_output, self.grad_lse, self.output = grads.output, grads.lse.masked_fill(empty, 0.0), output
        self.memory = Memory(lse)
        self.maps = Maps(inputs, self.memory)
        self.after = lse.new_zeros(inputs.query.shape[0], output.shape[-1] + 1, self.maps.bias.shape[-1])

    def segment(self, where: slice, chunk: int, state: Tensor, top: Tensor) -> None:
        """Gradients of a segment, given the state before it and its references."""
        done = []
        for piece in pieces(self.inputs, self.maps, where, chunk, top, self.memory):
            values = piece.memory.with_column("value", self.inputs.value[:, piece.where], 1.0)
            grads = self._grads(piece, state.mul_(piece.decay.unsqueeze(1)))
            pairs = piece.products("gradients of pairs", grads, values)
            self._to_queries(piece, values, grads, pairs, state)
            done.append((piece, values, grads, pairs))
        while done:
            self._to_keys(*done.pop())

    def _grads(self, piece: Piece, state: Tensor) -> Tensor:
        """Gradients of output and total: everything is linear in features divided by the total of a query."""
        where, dtype = piece.where, state.dtype
        grads = self.grad_output[:, where].to(dtype)
        shift = (grads * self.output[:, where].to(dtype)).sum(-1).sub_(self.grad_lse[:, where])
        mass = piece.keys.unflatten(1, (-1, piece.chunk)).sum(2)
        mass = torch.cat([state[:, -1:], mass[:, :-1]], 1).cumsum_(1)  # before every chunk
        total = piece.joined(piece.queries) @ mass.flatten(0, 1).unsqueeze(-1)
        total = total.add_(piece.pairs.sum(-1, keepdim=True)).view_as(piece.query_top)
        return piece.memory.with_column("grads", grads, shift.neg_()).div_(total.masked_fill_(total == 0, 1.0))

    def _to_queries(self, piece: Piece, values: Tensor, grads: Tensor, pairs: Tensor, state: Tensor) -> None:
        """Gradients of queries; `state` becomes that of the tokens after."""
        found = piece.memory.empty("gradients of features", *piece.queries.shape)
        chunks = (piece.chunks(z) for z in (found, grads, piece.keys, values))
        for of_chunk, grad, keys, value in zip(*chunks, strict=True):
            torch.bmm(grad, state, out=of_chunk)
            state.baddbmm_(value.mT, keys)
        piece.joined(found).baddbmm_(pairs, piece.joined(piece.keys))
        self._add((0, None, 1, 2), found.mul_(piece.queries), piece.where)

    def _to_keys(self, piece: Piece, values: Tensor, grads: Tensor, pairs: Tensor) -> None:
        """Gradients of keys and values; `after` becomes that of the tokens before."""
        found = piece.memory.empty("gradients of features", *piece.keys.shape)
        of_values = piece.memory.empty("gradients of values", *grads.shape[:-1], grads.shape[-1] - 1)
        chunks = (piece.chunks(z) for z in (found, of_values, piece.keys, values, piece.queries, grads))
        for of_chunk, of_value, keys, value, queries, grad in reversed(list(zip(*chunks, strict=True))):
            torch.bmm(value, self.after, out=of_chunk)
            torch.bmm(keys, self.after[:, :-1].mT, out=of_value)
            self.after.baddbmm_(grad.mT, queries)
        self.after.mul_(piece.decay.unsqueeze(1))
        piece.joined(found).baddbmm_(pairs.mT, piece.joined(piece.queries))
        self._add((3, 4, 5, 6), found.mul_(piece.keys), piece.where)
        if self.found[7] is not None:
            piece.joined(of_values).baddbmm_(piece.pairs.mT, piece.joined(grads)[..., :-1])
            self.found[7][:, piece.where] = of_values

    def _add(self, which: tuple[int, int | None, int, int], grad: Tensor, where: slice) -> None:
        """Add what follows from the gradients of logits to those of tokens, their bias, slots and their bias."""
        tokens, bias, slots, slot_bias = (None if i is None else self.found[i] for i in which)
        given_tokens, given_slots = self.inputs[which[0]], self.inputs[which[2]]
        if tokens is not None:
            torch.bmm(grad, given_slots.to(grad.dtype), out=tokens[:, where])
        if bias is not None:
            torch.sum(grad, -1, out=bias[:, where])
        if slots is not None:
            slots.baddbmm_(grad.mT, given_tokens[:, where].to(grad.dtype))
        if slot_bias is not None:
            slot_bias += grad.sum(1)
