"""What goes into attention through windows and slots of short inputs, and how it is cut into tiles."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .workspace import SMALL, scratch

# Numbers that the tensors of a tile hold in all, per thread: about what stays in a core's cache.
_TILE = 1 << 22


class ShortInputs(NamedTuple):
    """Tokens `[batch, tokens, heads, dim]` with any strides, and the maps of the slots.

    query_tokens, key_tokens: What the maps of the slots are applied to; `None` for `query` and `key`.
    query_bias, key_bias: `[batch, tokens, heads]`, what a token adds to its log-weight for every slot; `None` for 0.
        `-inf` hides a key, from its window too.
    query_slots, key_slots: `[batch or 1, heads, slots, dim]`.
    query_slot_bias, key_slot_bias: The same without `dim`; `None` for 0.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_tokens: Tensor | None
    key_tokens: Tensor | None
    query_bias: Tensor | None
    key_bias: Tensor | None
    query_slots: Tensor
    query_slot_bias: Tensor | None
    key_slots: Tensor
    key_slot_bias: Tensor | None


# The first fields are of tokens; what follows is shared by the tokens of a group.
OF_TOKENS = 7


class ShortOptions(NamedTuple):
    """What log-weights and logits are made of.

    places: Tokens of a window.
    grid: Height and width of an image whose patches the tokens are, row by row, and the side of its windows. Empty for
        a sequence, whose windows follow one another.
    root: Factor of all tokens (but values): its square is that of `query . key`.
    query_norm, key_norm: So many times half the squared length of a token is taken off its log-weights.
    shift: Added to the log-weights of queries.
    spreads: Each key spreads one unit of weight: the log-sum-exp of its log-weights over the slots is taken off.
    has_hidden: Whether some `key_bias` are `-inf`: those keys are read by nothing.
    with_lse: Whether the log-sum-exp is needed; it is NaN otherwise.
    probes: Numbers of tokens. With some, a number is added to the log-weights of every row's and head's queries: with
        it the probes, as queries, find on average as much mass in the slots as in all keys, but for `key_slot_bias`,
        which comes on top. It has no gradient. Not with hidden keys.
    """

    places: int
    grid: Sequence[int] = ()
    root: float = 1.0
    query_norm: float = 0.0
    key_norm: float = 0.0
    shift: float = 0.0
    spreads: bool = False
    has_hidden: bool = False
    with_lse: bool = True
    probes: Sequence[int] = ()


class Cut(NamedTuple):
    """Where a tile is: some rows and heads. Rows share their slots, or (`is_own`) each has its own.

    A group has the same slots: of a head the tokens of all `rows`, or of one.
    """

    rows: slice
    heads: slice
    slot_rows: slice
    is_own: bool
    is_whole: bool
    tokens: int
    missing: int
    grid: Sequence[int]
    axes: Mapping[int, tuple[int, ...]]

    def take(self, inputs: ShortInputs) -> ShortInputs:
        """This part of everything."""
        parts: list[Any] = []
        for x, name in zip(inputs, ShortInputs._fields, strict=True):
            if x is None:
                parts.append(None)
            elif len(parts) < OF_TOKENS:
                parts.append(self.tokens_of(x, name))
            else:
                x = x if self.is_whole else x[self.slot_rows, self.heads]
                parts.append(x.flatten(0, 1))
        return ShortInputs(*parts)

    def tokens_of(self, x: Tensor, name: str) -> Tensor:
        """This part of `[batch, tokens, heads(, dim)]`, without gaps: `[groups, tokens of all rows(, dim)]`.

        What fills the last window has hidden keys. Large results lie in memory that goes by their names.
        """
        part = (x if self.is_whole else x[self.rows, :, self.heads]).permute(self.axes[x.ndim])
        groups, rows, tokens, *dim = part.shape
        is_small = part.numel() < SMALL
        if is_small and not self.missing and not self.grid:
            taken = part.contiguous()
        else:
            shape = (groups, rows, tokens + self.missing, *dim)
            taken = x.new_empty(shape) if is_small else scratch(name, x.dtype, *shape)
            if self.missing:
                taken.fill_(float("-inf") if name == "key_bias" else 0.0)
            if not self.grid:
                (taken[:, :, : self.tokens] if self.missing else taken).copy_(part)
            else:
                for of_tokens, of_places in self._parts(part, taken):
                    of_places.copy_(of_tokens)
        return taken.flatten(0, 1) if self.is_own else taken.flatten(1, 2)

    def _parts(self, tokens: Tensor, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same patches in both tensors `[.., .., tokens or places(, dim)]`, so that all are in some part."""
        height, width, side = self.grid
        columns = -(-width // side)
        tokens = tokens.unflatten(2, (height, width))
        places = places.unflatten(2, (-1, columns, side, side)).transpose(3, 4)  # .. rows, side, columns, side
        for rows, row_side, of_height in _stretches(height, side):
            for columns_, column_side, of_width in _stretches(width, side):
                part = tokens[:, :, of_height, of_width]
                part = part.unflatten(3, (-1, column_side)).unflatten(2, (-1, row_side))
                yield part, places[:, :, rows, :row_side, columns_, :column_side]

    def write_tokens(self, x: Tensor, result: Tensor) -> None:
        """A result of this tile into its place in `[batch, tokens, heads(, dim)]`."""
        target = (x if self.is_whole else x[self.rows, :, self.heads]).permute(self.axes[x.ndim])
        result = result.view(*target.shape[:2], self.tokens + self.missing, *target.shape[3:])
        if not self.grid:
            target.copy_(result[:, :, : self.tokens] if self.missing else result)
            return
        for of_tokens, of_places in self._parts(target, result):
            of_tokens.copy_(of_places)

    def add_slots(self, x: Tensor, result: Tensor) -> None:
        """The same for slots, added."""
        target = x if self.is_whole else x[self.slot_rows, self.heads]
        target += result.view(target.shape)


@functools.lru_cache(maxsize=128)
def token_of_place(tokens: int, places: int, grid: tuple[int, ...]) -> Tensor:
    """`[windows, places]` (int64): the number of the token at every place of every window, -1 where there is none."""
    with torch.inference_mode(False), torch.device("cpu"):
        number = torch.arange(tokens)
        if not grid:
            return F.pad(number, (0, -tokens % places), value=-1).view(-1, places)
        height, width, side = grid
        number = F.pad(number.view(height, width), (0, -width % side, 0, -height % side), value=-1)
        columns = number.shape[1] // side
        return number.view(-1, side, columns, side).transpose(1, 2).reshape(-1, places)


def _stretches(length: int, side: int) -> Iterator[tuple[slice, int, slice]]:
    """Windows along one side of an image, how much of each is image, and which part of it: whole ones, the last."""
    whole = length // side
    if whole:
        yield slice(0, whole), side, slice(0, whole * side)
    if length % side:
        yield slice(whole, whole + 1), length % side, slice(whole * side, length)


# From `[batch, tokens, heads(, dim)]` to groups, rows and tokens, by the number of dimensions.
_HEADS_FIRST, _ROWS_FIRST = {3: (2, 0, 1), 4: (2, 0, 1, 3)}, {3: (0, 2, 1), 4: (0, 2, 1, 3)}


class Tile(NamedTuple):
    """Inputs of some groups: tokens `[groups, tokens of all rows(, dim)]`, slots `[groups, slots(, dim)]`.

    Behind the last token of a row there are hidden keys, to a whole window.
    """

    cut: Cut
    inputs: ShortInputs
    options: ShortOptions
    rows: int
    windows: int


def _even(count: int, most: int) -> int:
    """How many at a time, so that parts of at most so many are about as large as each other."""
    return -(-count // -(-count // max(1, most)))


def tiles(inputs: ShortInputs, options: ShortOptions) -> Iterator[Tile]:
    """As many heads, then rows at a time as stay within the limit, at least one of each."""
    batch, tokens, heads, dim = inputs.query.shape
    if not batch or not heads:
        return
    places, shared, slots = options.places, inputs.query_slots.shape[0], inputs.query_slots.shape[2]
    is_own, windows = 1 < shared == batch, -(-tokens // places)
    if options.grid:
        height, width, side = options.grid
        windows = -(-height // side) * -(-width // side)
    missing = windows * places - tokens
    if missing:
        options = options._replace(has_hidden=True)
        if inputs.key_bias is None:
            inputs = inputs._replace(key_bias=inputs.key.new_zeros(batch, tokens, heads))
    size = windows * (places * (2 * places + 4 * slots + 5 * dim) + 2 * slots * dim)
    budget = _TILE * torch.get_num_threads()
    per_head, per_row = heads, batch
    if size * heads * batch > budget:
        per_head, per_row = _even(heads, budget // size), _even(batch, budget // (size * heads))
    together = batch if is_own else batch // shared  # rows among which a tile may be cut
    grid, axes = options.grid, _ROWS_FIRST if is_own else _HEADS_FIRST
    is_whole = per_head == heads and per_row == batch == together
    for first in range(0, batch, together):
        for start in range(first, first + together, per_row):
            rows = slice(start, min(start + per_row, first + together))
            slot_rows = rows if is_own else slice(first // together, first // together + 1)
            for head in range(0, heads, per_head):
                some = slice(head, head + per_head)
                cut = Cut(rows, some, slot_rows, is_own, is_whole, tokens, missing, grid, axes)
                of_group = 1 if is_own else rows.stop - rows.start
                yield Tile(cut, cut.take(inputs), options, of_group, windows)
