"""What goes into attention through windows and slots of short inputs, and how it is cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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

    def tokens_of(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """This part of `[batch, tokens, heads(, dim)]`, without gaps, padded to whole windows."""
        x = self._arranged(x).contiguous()
        if self.is_own:
            x = x.flatten(0, 1).unsqueeze(1)
        if self.missing:
            x = F.pad(x, (0, self.missing) if x.ndim == 3 else (0, 0, 0, self.missing), value=fill)
        return x

    def slots_of(self, x: Tensor) -> Tensor:
        """This part of `[batch or 1, heads, slots(, dim)]`."""
        return x[self.slot_rows, self.heads].flatten(0, 1)

    def write_tokens(self, x: Tensor, result: Tensor) -> None:
        """A result of this tile into its place in `[batch, tokens, heads(, dim)]`."""
        target = self._arranged(x)
        target.copy_(result[:, :, : self.tokens].view(target.shape))

    def add_slots(self, x: Tensor, result: Tensor) -> None:
        """The same for slots, added."""
        target = x[self.slot_rows, self.heads]
        target += result.view(target.shape)

    def _arranged(self, x: Tensor) -> Tensor:
        """A view with heads and rows, or with slots of their own rows and heads, before the tokens."""
        part = x[self.rows, :, self.heads]
        if self.is_own:
            return part.transpose(1, 2)
        return part.permute(2, 0, 1) if x.ndim == 3 else part.permute(2, 0, 1, 3)


class Tile(NamedTuple):
    """Inputs of some rows and heads, as `Cut` says; behind the last token there are hidden keys, to a whole window."""

    cut: Cut
    inputs: ShortInputs
    places: int

    @property
    def windows(self) -> int:
        return self.inputs.query.shape[2] // self.places


def _even(count: int, most: int) -> int:
    """How many at a time, so that parts of at most so many are about as large as each other."""
    return -(-count // -(-count // max(1, most)))


def tiles(inputs: ShortInputs, places: int) -> Iterator[Tile]:
    """As many heads, then rows at a time as stay within the limit, at least one of each."""
    batch, tokens, heads, dim = inputs.query.shape
    shared, slots = inputs.query_slots.shape[0], inputs.query_slots.shape[2]
    is_own, windows = 1 < shared == batch, -(-tokens // places)
    size = windows * (places * (2 * places + 4 * slots + 5 * dim) + 2 * slots * dim)
    budget = _TILE * torch.get_num_threads()
    per_head, per_row = _even(heads, budget // size), _even(batch, budget // (size * heads))
    together = batch if is_own else batch // shared  # rows among which a tile may be cut
    others: Any = inputs[: OF_TOKENS - 1]
    of_slots: Any = inputs[OF_TOKENS:]
    for first in range(0, batch, together):
        for start in range(first, first + together, per_row):
            rows = slice(start, min(start + per_row, first + together))
            slot_rows = rows if is_own else slice(first // together, first // together + 1)
            for head in range(0, heads, per_head):
                cut = Cut(rows, slice(head, head + per_head), slot_rows, is_own, tokens, -tokens % places)
                parts: list[Any] = [None if z is None else cut.tokens_of(z) for z in others]
                parts += [cut.tokens_of(inputs.key_bias, float("-inf")), *map(cut.slots_of, of_slots)]
                yield Tile(cut, ShortInputs(*parts), places)
