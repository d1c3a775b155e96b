"""Short inputs: every window's keys and all chunks beside each other, so that one softmax reads both.

Tensors are cut into windows as `[batch, windows, heads, places, dim]`, the order in which the tokens of models lie in
memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the keys of a tile: keys and values of a few windows, which stay in a core's caches.
_TILE = 1 << 19


class Sizes(NamedTuple):
    """How tokens are cut.

    tokens: Real tokens of every row; what comes after them fills the last window.
    window, chunk: Tokens of each; a chunk divides a window.
    weighs_size: Chunks weigh by their number of tokens, or all the same.
    root: Keys are multiplied by it, and so are the logits.
    """

    tokens: int
    window: int
    chunk: int
    weighs_size: bool
    root: float

    def cut(self, x: Tensor) -> Tensor:
        """`[batch, places, heads, dim]` -> `[batch, windows, heads, places of a window, dim]`, a view."""
        return x.unflatten(1, (-1, self.window)).transpose(2, 3)

    def chunks(self, x: Tensor) -> Tensor:
        """`[batch, windows, heads, places of a window, dim]` -> `[batch, windows, heads, chunks of a window, members,
        dim]`, a view."""
        return x.unflatten(3, (-1, self.chunk))


class Places(NamedTuple):
    """What does not depend on values.

    bias: `[windows, 1, 1, keys + chunks]`: of the logits of a window's keys and of all chunks; `-inf` where one is not
        read.
    member: `[windows, 1, chunks of a window, members]`, False for a place without a token; `None` if all have one.
    """

    bias: Tensor
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
    bias = torch.cat([torch.where(real, 0.0, hidden), torch.where(own, hidden, weight)], dim=-1)
    return Places(bias[:, None, None], None if tokens % window == 0 else real.view(count, 1, window // chunk, chunk))


def tiles(key: Tensor, sizes: Sizes) -> Iterator[tuple[slice, slice]]:
    """Rows and heads at a time, for keys `[batch, places, heads, dim]`."""
    batch, length, heads, dim = key.shape
    of_head = length * (1 + length // (sizes.window * sizes.chunk)) * dim
    some = max(1, min(heads, _TILE // of_head))
    rows = max(1, _TILE // (of_head * heads)) if some == heads else 1
    for row in range(0, batch, rows):
        for head in range(0, heads, some):
            yield slice(row, row + rows), slice(head, head + some)
