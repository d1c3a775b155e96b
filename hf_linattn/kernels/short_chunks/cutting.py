"""How short inputs are cut into windows and chunks.

Tokens get places, so that the tokens of a window are neighbours, and those of a chunk too: one of the two divides the
other. In a sequence that is the order of the tokens; the patches of an image are sorted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Sizes(NamedTuple):
    """How tokens are cut.

    window, chunk: Tokens of each (sides of squares with a grid), one of which divides the other. Of a chunk longer
        than a window, the windows are read one by one, each as a summary, where one of them is the query's own.
    weighs_size: Summaries weigh by their number of tokens, or all the same.
    scaling: Factor of the dot product.
    height, width: Of the grid of patches that the tokens are; 0 for a sequence.
    num_global: Tokens before the others, which see all and are seen by all.
    lengths, chunks: Of every row, how many tokens are real, the first ones, and its `chunk`. Empty if all are.
    """

    window: int
    chunk: int
    weighs_size: bool
    scaling: float
    height: int = 0
    width: int = 0
    num_global: int = 0
    lengths: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()

    @classmethod
    def of(cls, values: Sequence[Any]) -> Sizes:
        """From what an operator got."""
        return cls._make([*values[:-2], tuple(values[-2]), tuple(values[-1])])

    @property
    def members(self) -> list[int]:
        """Places of a summary, for every sort of summary."""
        power = 2 if self.height else 1
        return [size**power for size in ([self.chunk, self.window] if self.chunk > self.window else [self.chunk])]

    @property
    def places_of_window(self) -> int:
        return self.window**2 if self.height else self.window

    def count(self, tokens: int) -> int:
        """Places of a row of so many tokens, global ones left out: whole windows and chunks."""
        size = max(self.window, self.chunk)
        if self.height:
            return -(-self.height // size) * -(-self.width // size) * size**2
        return -(-tokens // size) * size


class Sort(NamedTuple):
    """Summaries of so many tokens each.

    share: `[batch * chunks, 1, members]`, one over the number of real members; 0 for a place without a token.
    ones: The same with ones.
    absent: `[batch * chunks, members, 1]`, True for a place without a token; `None` if all have one.
    """

    length: int
    share: Tensor
    ones: Tensor
    absent: Tensor | None


class Places(NamedTuple):
    """What does not depend on values. `rows` is 1 where all are alike, else the batch.

    Summaries of all sorts are numbered one sort after the other, and behind them the global tokens.

    total: Places of a row, `window` of them in a window. is_plain: Every token is at the place of its number.
    token_of: `[places]`, the token of a place, 0 where there is none; `place_of`: `[tokens]`, its place. `None` where
        places are tokens in their order.
    near: `[batch * windows, 1, 1, window]`, `-inf` for a place without a token; `None` if all have one.
    empty: `[places]`, True for a place without a token, where tokens are sorted and a place has none.
    far: `[rows, 1, tokens, summaries]`: log-weights of the summaries that a token reads, `-inf` of the others.
    read: `[rows, tokens, summaries]`: 1 for those that it reads, else 0.
    alone: `[rows, tokens, 1]`, True where it reads none of them; `None` if no token is alone. In `shown` they read
        all.
    """

    total: int
    window: int
    is_plain: bool
    sorts: list[Sort]
    token_of: Tensor | None
    place_of: Tensor | None
    near: Tensor | None
    empty: Tensor | None
    far: Tensor
    read: Tensor
    alone: Tensor | None
    shown: Tensor


@functools.lru_cache(maxsize=64)
def places(sizes: Sizes, batch: int, tokens: int, dtype: torch.dtype) -> Places:
    """The same for every call with these sizes and so many tokens, global ones left out, on the CPU."""
    with torch.device("cpu"), torch.inference_mode(False):  # whatever the defaults are
        return _places(sizes, batch, tokens, dtype)


def _places(sizes: Sizes, batch: int, tokens: int, dtype: torch.dtype) -> Places:
    hidden, count, window = torch.full((), float("-inf"), dtype=dtype), sizes.count(tokens), sizes.places_of_window
    index = _order(sizes)
    real = _real(sizes, tokens, index)
    is_whole = bool(real.all())
    sorts = []
    for size in sizes.members:
        summaries, is_member = batch * (count // size), real.view(len(real), -1, 1, size)
        ones = torch.ones(1, 1, size, dtype=dtype).expand(summaries, 1, size)
        if is_whole:
            sorts.append(Sort(size, (ones[:1] / size).expand(summaries, 1, size), ones, None))
            continue
        is_member = is_member.expand(batch, -1, -1, -1).flatten(0, 1)
        share = is_member.to(dtype)
        share /= share.sum(-1, keepdim=True).clamp_min(1.0)
        sorts.append(Sort(size, share, ones, ~is_member.mT))
    place = torch.arange(tokens) if index is None else index.argsort(stable=True)[:tokens]
    far = _far(sizes, real, dtype)[:, place // window]  # [rows, tokens, summaries]
    far = F.pad(far, (0, sizes.num_global))
    read = far > float("-inf")
    alone, shown = ~read.any(-1, keepdim=True), far
    if bool(alone.any()):
        shown = far.masked_fill(alone, 0.0)
    near = None
    if not is_whole:
        # Windows without a token read something as well, so that no sum of weights is 0.
        seen = real.view(-1, window)
        seen = seen | ~seen.any(-1, keepdim=True)
        near = torch.where(seen, torch.zeros_like(hidden), hidden)[:, None, None].repeat(batch // len(real), 1, 1, 1)
    return Places(
        count,
        window,
        index is None and count == tokens and not sizes.num_global,
        sorts,
        None if index is None else torch.where(index < tokens, index, 0),
        None if index is None else place,
        near,
        None if index is None or is_whole else ~real[0],
        far.unsqueeze(1),
        read.to(dtype),
        None if shown is far else alone,
        shown.unsqueeze(1),
    )


def _real(sizes: Sizes, tokens: int, index: Tensor | None) -> Tensor:
    """`[rows, places]`, True where there is a token. index: As `_order` gives it."""
    number = torch.arange(sizes.count(tokens)) if index is None else index
    return number < torch.tensor(sizes.lengths or (tokens,)).clamp_max_(tokens)[:, None]


def _far(sizes: Sizes, real: Tensor, dtype: torch.dtype) -> Tensor:
    """`[rows, windows, summaries]`: log-weights of the summaries that a window reads, `-inf` of the others."""
    first = torch.arange(0, real.shape[1], sizes.places_of_window)[:, None]  # of every window
    weights, reads = [], []
    for size in sizes.members:
        members = real.view(len(real), -1, size).sum(-1).to(dtype)
        weights.append(members.log() if sizes.weighs_size else members.log().clamp_max_(0.0))
        start = torch.arange(0, real.shape[1], size)
        if size >= sizes.places_of_window:
            own = first // size * size == start
        else:
            own = first == start // sizes.places_of_window * sizes.places_of_window
        if size < sizes.members[0]:  # windows, where their chunk is not read
            own = own | (start // sizes.members[0] != first // sizes.members[0])
        reads.append(~own)
    return torch.cat(weights, -1)[:, None].masked_fill(~torch.cat(reads, -1), float("-inf"))


class Tables(NamedTuple):
    """The same for C; `rows` is 1 where all are alike. Global tokens are behind all places, and before all summaries.

    token_of: `[rows, places + num_global]` (int64), the number of a token among all; -1 for a place without one.
    far: `[rows, windows, num_global + summaries]` (float32), log-weights; `-inf` of what a window does not read.
    """

    token_of: Tensor
    far: Tensor


@functools.lru_cache(maxsize=64)
def tables(sizes: Sizes, tokens: int) -> Tables:
    """For so many tokens, global ones left out."""
    with torch.device("cpu"), torch.inference_mode(False):
        index = _order(sizes)
        real, number = _real(sizes, tokens, index), torch.arange(sizes.count(tokens)) if index is None else index
        token_of = torch.where(real, number + sizes.num_global, -1)
        every = torch.arange(sizes.num_global).expand(len(real), -1)
        far = F.pad(_far(sizes, real, torch.float32), (sizes.num_global, 0))
        return Tables(torch.cat([token_of, every], -1), far.contiguous())


def _order(sizes: Sizes) -> Tensor | None:
    """`[places]`: the patch at every place, or their number where there is none; `None` for a sequence."""
    height, width = sizes.height, sizes.width
    if not height:
        return None
    large, small = max(sizes.window, sizes.chunk), min(sizes.window, sizes.chunk)
    rows, columns, inner = -(-height // large), -(-width // large), large // small
    number = torch.full((rows * large, columns * large), height * width)
    number[:height, :width] = torch.arange(height * width).view(height, width)
    number = number.view(rows, inner, small, columns, inner, small)
    return number.permute(0, 3, 1, 4, 2, 5).flatten()


@functools.lru_cache(maxsize=64)
def _of_rows(sizes: Sizes, tokens: int, batch: int) -> tuple[Tensor, Tensor]:
    """`token_of` among the tokens of all rows, global ones included, and `place_of` among all places."""
    fixed = places(sizes, batch, tokens, torch.float32)
    assert fixed.token_of is not None
    assert fixed.place_of is not None
    with torch.inference_mode(False):
        row = torch.arange(batch, device="cpu")[:, None]
        index = row * (tokens + sizes.num_global) + sizes.num_global + fixed.token_of
        return index.flatten(), (row * fixed.total + fixed.place_of).flatten()


def to_places(x: Tensor, sizes: Sizes, count: int) -> Tensor:
    """`[batch, tokens, heads(, dim)]`, global tokens included -> `[batch, count, heads(, dim)]`, without gaps."""
    tokens = x.shape[1] - sizes.num_global
    if sizes.height:
        index, _ = _of_rows(sizes, tokens, len(x))
        return x.reshape(-1, *x.shape[2:]).index_select(0, index).view(len(x), count, *x.shape[2:])
    own = x[:, sizes.num_global :] if sizes.num_global else x
    if count > tokens:
        own = F.pad(own, (0, 0) * (x.ndim - 2) + (0, count - tokens))
    return own.contiguous()


def to_tokens(x: Tensor, sizes: Sizes, tokens: int) -> Tensor:
    """Back to the tokens, global ones left out: `[batch, places, heads(, dim)]` -> `[batch, tokens, heads(, dim)]`."""
    if sizes.height:
        _, inverse = _of_rows(sizes, tokens, len(x))
        return x.flatten(0, 1).index_select(0, inverse).view(len(x), tokens, *x.shape[2:])
    return x if x.shape[1] == tokens else x[:, :tokens]
