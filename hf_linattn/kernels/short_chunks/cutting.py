"""How short inputs are cut into windows and chunks, and how many of them are computed at a time.

Tokens come before heads, as they lie in the memory of models: `[batch, windows, places of a window, heads, dim]`, and
`[batch, windows, chunks of a window, members, heads, dim]`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the keys that the windows of a tile read: a core's caches hold them.
_TILE = 1 << 19


class Sizes(NamedTuple):
    """How tokens are cut.

    tokens: Real tokens of every row; what comes after them fills the last window.
    window, chunk: Tokens of each; a chunk divides a window.
    weighs_size: Chunks weigh by their number of tokens, or all the same.
    root: Queries and keys are multiplied by it.
    """

    tokens: int
    window: int
    chunk: int
    weighs_size: bool
    root: float

    def windows(self, x: Tensor) -> Tensor:
        """`[batch, places, heads, dim]` by windows, a view."""
        return x.unflatten(1, (-1, self.window))

    def chunks(self, x: Tensor) -> Tensor:
        """What is cut into windows, cut into chunks, a view."""
        return x.unflatten(2, (-1, self.chunk))


class Places(NamedTuple):
    """What does not depend on values.

    bias: `[windows, 1, 1, keys + chunks]`: of the logits of a window's keys and of all chunks; `-inf` where one is not
        read.
    share: One over the number of members, `[windows, chunks of a window, 1, 1]` where it differs; 0 for no member.
    member: `[windows, chunks of a window, members, 1]`, False for a place without a token; `None` if all have one.
    """

    bias: Tensor
    share: Tensor | float
    member: Tensor | None


@functools.lru_cache(maxsize=64)
def places(sizes: Sizes, dtype: torch.dtype) -> Places:
    """The same for every call with these sizes, on the CPU."""
    tokens, window, chunk = sizes[:3]
    count = -(-tokens // window)
    real = (torch.arange(count * window, device="cpu") < tokens).view(count, window)
    members = real.view(-1, chunk).sum(-1).to(dtype)
    weight = members.log() if sizes.weighs_size else members.log().clamp_max_(0.0)
    hidden = torch.full((), float("-inf"), dtype=dtype, device="cpu")
    own = torch.arange(len(members), device="cpu") // (window // chunk) == torch.arange(count, device="cpu")[:, None]
    bias = torch.cat([torch.where(real, 0.0, hidden), torch.where(own, hidden, weight)], dim=-1)[:, None, None]
    if tokens % window == 0:
        return Places(bias, 1 / chunk, None)
    share = (1 / members).masked_fill_(members == 0, 0.0)
    return Places(bias, share.view(count, -1, 1, 1), real.view(count, -1, chunk, 1))


class Tile(NamedTuple):
    """Some rows and heads, and which parameters they have."""

    rows: slice
    heads: slice
    parameters: int


def tiles(key: Tensor, sizes: Sizes, parameters: int) -> Iterator[Tile]:
    """All rows and heads of keys `[batch, places, heads, dim]`, which as many rows after each other share as there are
    for each of the `parameters`."""
    batch, length, heads, dim = key.shape
    of_head = length * (1 + length // (sizes.window * sizes.chunk)) * dim
    some, shared = max(1, min(heads, _TILE // of_head)), batch // parameters
    rows = max(1, min(shared, _TILE // (of_head * heads))) if some == heads else 1
    for start in range(0, batch, shared):
        for row in range(start, start + shared, rows):
            for head in range(0, heads, some):
                part = slice(row, min(row + rows, start + shared))
                yield Tile(part, slice(head, head + some), start // shared)
