"""What goes into attention through windows and slots of short inputs, and how it is cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Numbers that the tensors of a tile hold in all, per thread: about what stays in a core's cache.
_TILE = 1 << 19


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


class Tile(NamedTuple):
    """Some groups of tokens that share their slots: `inputs` without gaps, `[groups, rows, windows * places(, dim)]`.

    Slots are `[groups, slots(, dim)]`. Behind the last token there are hidden keys, up to a whole window.
    """

    place: tuple[slice, slice, slice]
    tokens: int
    places: int
    inputs: ShortInputs

    @property
    def windows(self) -> int:
        return self.inputs.query.shape[2] // self.places

    def cut(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """`by_group(...)[place]` as `[groups, rows, windows * places(, dim)]`, without gaps."""
        x = x.flatten(0, 1)
        missing = -self.tokens % self.places
        if not missing:
            return x.contiguous()
        padding = (0, missing) if x.ndim == 3 else (0, 0, 0, missing)
        return F.pad(x, padding, value=fill)

    def write(self, x: Tensor, result: Tensor) -> None:
        """Into `x`, from `by_group`, what belongs there of a result `[groups, rows, windows * places(, dim)]`."""
        target = x[self.place]
        target.copy_(result[:, :, : self.tokens].view(target.shape))


def by_group(x: Tensor, inputs: ShortInputs) -> Tensor:
    """`[batch, tokens, heads(, dim)]` as `[batch or 1, heads, rows, tokens(, dim)]`: rows of a group share slots."""
    shared = inputs.query_slots.shape[0]
    return x.unflatten(0, (shared, x.shape[0] // shared)).movedim(3, 1)


def tiles(inputs: ShortInputs, places: int) -> Iterator[Tile]:
    """As many rows, then heads, then groups at a time as stay within the limit, at least one of each."""
    batch, tokens, heads, dim = inputs.query.shape
    groups, slots = inputs.query_slots.shape[0], inputs.query_slots.shape[2]
    rows, windows = batch // groups, -(-tokens // places)
    size = windows * (places * (2 * places + 4 * slots + 5 * dim) + 2 * slots * dim)
    budget = _TILE * torch.get_num_threads()
    per_head = min(heads, max(1, budget // size))
    per_row = min(rows, max(1, budget // (size * heads)))
    per_group = min(groups, max(1, budget // (size * heads * rows)))
    grouped = [None if z is None else by_group(z, inputs) for z in inputs[:OF_TOKENS]]
    for group in range(0, groups, per_group):
        for head in range(0, heads, per_head):
            for row in range(0, rows, per_row):
                some = slice(group, group + per_group), slice(head, head + per_head)
                tile = Tile((*some, slice(row, row + per_row)), tokens, places, inputs)
                cut = [None if z is None else tile.cut(z[tile.place]) for z in grouped[: OF_TOKENS - 1]]
                hidden = float("-inf")
                shared = [z[some].flatten(0, 1) for z in inputs[OF_TOKENS:]]
                bias = tile.cut(grouped[OF_TOKENS - 1][tile.place], hidden)  # type: ignore[index]
                yield tile._replace(inputs=ShortInputs(*cut, bias, *shared))
