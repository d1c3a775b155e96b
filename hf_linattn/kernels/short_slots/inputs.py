"""What goes into attention through windows and slots of short inputs, and how it is cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .workspace import SMALL, scratch

# Numbers that the tensors of a tile hold in all, per thread: about what stays in a core's cache.
_TILE = 1 << 21


class ShortInputs(NamedTuple):
    """Tokens `[batch, tokens, heads, dim]` with any strides, and the maps of the slots.

    query, key, value: Queries and keys are scaled: their products are the logits of a window.
    query_tokens, key_tokens: What the maps of the slots are applied to; `None` for `query` and `key`.
    query_bias, key_bias: `[batch, tokens, heads]`, what a token adds to its log-weight for every slot. `-inf` hides a
        key, from its window too.
    query_slots, key_slots: `[batch or 1, heads, slots, dim]`; their biases without `dim`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_tokens: Tensor | None
    key_tokens: Tensor | None
    query_bias: Tensor
    key_bias: Tensor
    query_slots: Tensor
    query_slot_bias: Tensor
    key_slots: Tensor
    key_slot_bias: Tensor


# The first fields are of tokens; what follows is shared by the tokens of a group.
OF_TOKENS = 7


class Cut(NamedTuple):
    """Where a tile is: some rows and heads. Rows share their slots, or (`is_own`) each has its own.

    In a tile tokens are `[groups, rows, tokens(, dim)]`, slots `[groups, slots(, dim)]`.
    """

    rows: slice
    heads: slice
    slot_rows: slice
    is_own: bool
    tokens: int
    missing: int

    def take(self, inputs: ShortInputs) -> ShortInputs:
        """This part of everything."""
        parts: list[Any] = self.tokens_of(inputs[:OF_TOKENS], ShortInputs._fields)
        for x in inputs[OF_TOKENS:]:
            parts.append(x[self.slot_rows, self.heads].flatten(0, 1))  # type: ignore[index]  # noqa: PERF401
        return ShortInputs(*parts)

    def tokens_of(self, tensors: Sequence[Tensor | None], names: Sequence[str]) -> list[Tensor | None]:
        """This part of tensors `[batch, tokens, heads(, dim)]`, without gaps, in memory by their names.

        What fills the last window has hidden keys.
        """
        found: list[Tensor | None] = []
        for x, name in zip(tensors, names, strict=False):
            if x is None:
                found.append(None)
                continue
            part = x[self.rows, :, self.heads]
            part = part.transpose(1, 2) if self.is_own else part.permute(_HEADS_FIRST[x.ndim])
            is_small = part.numel() < SMALL
            if is_small and not self.missing:
                taken = part.contiguous()
            else:
                groups, rows, tokens, *dim = part.shape
                shape = (groups, rows, tokens + self.missing, *dim)
                taken = x.new_empty(shape) if is_small else scratch(name, x.dtype, *shape)
                taken[:, :, tokens:].fill_(float("-inf") if name == "key_bias" else 0.0)
                taken[:, :, :tokens].copy_(part)
            found.append(taken.flatten(0, 1).unsqueeze(1) if self.is_own else taken)
        return found

    def write_tokens(self, x: Tensor, result: Tensor) -> None:
        """A result of this tile into its place in `[batch, tokens, heads(, dim)]`."""
        target = x[self.rows, :, self.heads]
        target = target.transpose(1, 2) if self.is_own else target.permute(_HEADS_FIRST[x.ndim])
        target.copy_(result[:, :, : self.tokens].view(target.shape))

    def add_slots(self, x: Tensor, result: Tensor) -> None:
        """The same for slots, added."""
        target = x[self.slot_rows, self.heads]
        target += result.view(target.shape)


# Heads before rows, by the number of dimensions.
_HEADS_FIRST = {3: (2, 0, 1), 4: (2, 0, 1, 3)}


class Tile(NamedTuple):
    """Inputs of some rows and heads, as `Cut` says; behind the last token there are hidden keys, to a whole window."""

    cut: Cut
    inputs: ShortInputs
    places: int
    windows: int


def _even(count: int, most: int) -> int:
    """How many at a time, so that parts of at most so many are about as large as each other."""
    return -(-count // -(-count // max(1, most)))


def tiles(inputs: ShortInputs, places: int) -> Iterator[Tile]:
    """As many heads, then rows at a time as stay within the limit, at least one of each."""
    batch, tokens, heads, dim = inputs.query.shape
    if not batch or not heads:
        return
    shared, slots = inputs.query_slots.shape[0], inputs.query_slots.shape[2]
    is_own, windows = 1 < shared == batch, -(-tokens // places)
    size = windows * (places * (2 * places + 4 * slots + 5 * dim) + 2 * slots * dim)
    budget = _TILE * torch.get_num_threads()
    per_head, per_row = heads, batch
    if size * heads * batch > budget:
        per_head, per_row = _even(heads, budget // size), _even(batch, budget // (size * heads))
    together = batch if is_own else batch // shared  # rows among which a tile may be cut
    for first in range(0, batch, together):
        for start in range(first, first + together, per_row):
            rows = slice(start, min(start + per_row, first + together))
            slot_rows = rows if is_own else slice(first // together, first // together + 1)
            for head in range(0, heads, per_head):
                cut = Cut(rows, slice(head, head + per_head), slot_rows, is_own, tokens, -tokens % places)
                yield Tile(cut, cut.take(inputs), places, windows)
