"""The parts of a row that LARA's landmarks stand for: segments of a sequence, bins of an image.

Of tokens that are all real the parts are views and small averages. Padded rows take an index of the members of each
part (`IndexedParts`), which can describe all parts: the plain form that the others are tested against.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..layout import gather_tokens, masked_mean
from ..padding import Tokens
from ..tracing import outside_tracing

# Entries of the matrices that average the tokens of padded rows; beyond it tokens are gathered.
_MOST = 1 << 22
# Tokens of a segment that are added one by one.
_FEW = 4


class Parts(Protocol):
    """`used`: `[batch or 1, 1, 1, parts]`, False for a part without tokens; `None` if all have some."""

    @property
    def used(self) -> Tensor | None: ...

    def mean(self, z: Tensor) -> Tensor:
        """Mean over the tokens of every part, `[batch, heads, tokens, dim]` -> `[batch, heads, parts, dim]`."""

    def middle(self, z: Tensor) -> Tensor:
        """The middle token of every part, of the same shapes."""

    def middles(self) -> tuple[int, ...]:
        """Its number, where all rows have the same parts; nothing where it has to be computed."""


def parts_of(tokens: Tokens, num_landmarks: int) -> Parts:
    """The parts of the rows of `tokens`; of an image the largest square number up to `num_landmarks`."""
    longest = tokens.key.shape[2]
    if tokens.grid is not None:
        return Bins(tokens.grid, math.isqrt(num_landmarks))
    if longest <= num_landmarks:
        return OwnTokens(None if tokens.valid is None else tokens.valid[:, None, None, :], longest)
    if tokens.valid is None:
        return Segments(longest, num_landmarks)
    index = segment_index(tokens.lengths, num_landmarks, longest)
    batch, heads = tokens.key.shape[:2]
    return PaddedSegments(index, longest) if batch * heads * num_landmarks * longest <= _MOST else IndexedParts(index)


@dataclass(frozen=True)
class OwnTokens:
    """Every token is a part. used: which tokens are real; the others are 0."""

    used: Tensor | None
    count: int

    def mean(self, z: Tensor) -> Tensor:
        return z

    def middle(self, z: Tensor) -> Tensor:
        return z

    def middles(self) -> tuple[int, ...]:
        return () if self.used is not None else tuple(range(self.count))


@dataclass(frozen=True)
class Segments:
    """`segment_index` of rows that all have so many `tokens`, at least one for each of `count` segments."""

    tokens: int
    count: int
    used = None

    def mean(self, z: Tensor) -> Tensor:
        parts = [_mean(part) for part in self._of_equal_size(z)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def middles(self) -> tuple[int, ...]:
        size, longer = divmod(self.tokens, self.count)
        shorter = self.count - longer
        starts = [number * size + max(0, number - shorter) for number in range(self.count)]
        return tuple(start + (size + (number >= shorter)) // 2 for number, start in enumerate(starts))

    def middle(self, z: Tensor) -> Tensor:
        parts = [part[..., part.shape[3] // 2, :] for part in self._of_equal_size(z)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _of_equal_size(self, z: Tensor) -> list[Tensor]:
        """`[batch, heads, segments, tokens of one, dim]`: the shorter segments, then those with a token more."""
        size, longer = divmod(self.tokens, self.count)
        if not longer:
            return [z.unflatten(2, (self.count, size))]
        border = (self.count - longer) * size
        shorter = z[:, :, :border].unflatten(2, (self.count - longer, size))
        return [shorter, z[:, :, border:].unflatten(2, (longer, size + 1))]


def _mean(z: Tensor) -> Tensor:
    """Mean over dimension 3. A few tensors are added faster than that is found."""
    size = z.shape[3]
    if size > _FEW:
        return z.mean(3)
    total, *others = z.unbind(3)
    for other in others:
        total = total + other
    return total / size


@dataclass(frozen=True)
class Bins:
    """`grid_bins` of an image: means over columns, then over rows."""

    grid: tuple[int, int]
    bins: int
    used = None

    def mean(self, z: Tensor) -> Tensor:
        height, width = self.grid
        of_rows, of_columns, _ = bin_table(height, width, self.bins, str(z.device), str(z.dtype))
        columns = of_columns @ z.unflatten(2, self.grid)
        return (of_rows @ columns.flatten(3)).flatten(2).unflatten(2, (self.bins**2, z.shape[-1]))

    def middle(self, z: Tensor) -> Tensor:
        return z.index_select(2, bin_table(*self.grid, self.bins, str(z.device), str(z.dtype))[2])

    def middles(self) -> tuple[int, ...]:
        return ()  # of an image they are asked for by no kernel


@dataclass(frozen=True)
class IndexedParts:
    """Any parts. index: `[batch or 1, parts, members]` token numbers, -1 where there is no such member."""

    index: Tensor

    @property
    def used(self) -> Tensor:
        return (self.index[..., 0] >= 0)[:, None, None, :]

    def mean(self, z: Tensor) -> Tensor:
        return masked_mean(gather_tokens(z, self.index), self.index >= 0)

    def middle(self, z: Tensor) -> Tensor:
        # Counted per row, so that padding in other rows has no influence; of a part without tokens any.
        size = (self.index >= 0).sum(-1, keepdim=True)
        return gather_tokens(z, self.index.gather(-1, size // 2 % self.index.shape[-1])).squeeze(-2)

    def middles(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class PaddedSegments(IndexedParts):
    """Few enough parts and tokens for means to be one product; gathering takes ten times as long on a CPU."""

    tokens: int

    def mean(self, z: Tensor) -> Tensor:
        first, size = self.index[..., :1], (self.index >= 0).sum(-1, keepdim=True)
        behind = torch.arange(self.tokens, device=z.device) - first
        inside = (behind >= 0) & (behind < size)
        return (inside.to(z) / size.clamp_min(1)).unsqueeze(1) @ z


def segment_index(lengths: Tensor, num_segments: int, longest: int) -> Tensor:
    """Cut each row's first `lengths[b]` tokens into `num_segments` consecutive segments of nearly equal length.

    A row with at most `num_segments` tokens has one token per segment and the rest of its segments empty. Otherwise,
    with `S = floor(length / num_segments)`, the first segments have `S` tokens and the last `length - S *
    num_segments` have `S + 1` (the landmarks of LARA; official code, `HKUNLP/efficient-attention`).

    Args:
        lengths: `[batch]` integers. longest: An upper bound of the lengths that is known without reading them.
    Returns: `[batch, num_segments, members]` token numbers, -1 where a segment has no such member.
    """
    device = lengths.device
    segment = torch.arange(num_segments, device=device)
    members = torch.arange(max(1, -(-longest // num_segments)), device=device)
    short = lengths[:, None] // num_segments
    num_long = lengths[:, None] - short * num_segments
    first_long = num_segments - num_long
    few = lengths[:, None] <= num_segments
    start = torch.where(few, segment, segment * short + (segment - first_long).clamp_min(0))
    size = torch.where(few, (segment < lengths[:, None]).long(), short + (segment >= first_long).long())
    index = start[..., None] + members
    return torch.where(members < size[..., None], index, -1)


def grid_bins(grid: tuple[int, int], bins: int) -> Tensor:
    """Adaptive average pooling as an index: `bins x bins` rectangles that cover the grid and may share cells.

    Bin `(r, c)` holds rows `floor(r H / bins) .. ceil((r + 1) H / bins) - 1` and columns likewise.
    Returns: `[1, bins * bins, members]`, -1 padded.
    """
    of_rows, of_columns = (_stretches(side, bins) for side in grid)
    cells = [
        [row * grid[1] + column for row in rows for column in columns] for rows in of_rows for columns in of_columns
    ]
    longest = max(len(cell) for cell in cells)
    return torch.tensor([[*cell, *[-1] * (longest - len(cell))] for cell in cells]).unsqueeze(0)


def _stretches(side: int, bins: int) -> list[range]:
    """The rows (or columns) of each bin."""
    return [range(number * side // bins, -(-(number + 1) * side // bins)) for number in range(bins)]


@torch.compiler.assume_constant_result
def bin_table(height: int, width: int, bins: int, device: str, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """For `Bins`: how much rows `[bins, height]` and columns `[bins, width]` weigh in a mean, and middle cells.

    A function of plain values, so `torch.compile` takes it as a constant.
    """
    return _bin_table(height, width, bins, device, dtype)


@functools.lru_cache(maxsize=64)
def _bin_table(height: int, width: int, bins: int, device: str, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    number = getattr(torch, dtype.removeprefix("torch."))
    with outside_tracing():
        weights = []
        for side in (height, width):
            of_side = torch.zeros(bins, side, dtype=torch.float64)
            for row, places in zip(of_side, _stretches(side, bins), strict=True):
                row[places.start : places.stop] = 1 / len(places)
            weights.append(of_side.to(dtype=number).to(device))
        index = grid_bins((height, width), bins)
        middle = index.gather(-1, (index >= 0).sum(-1, keepdim=True) // 2 % index.shape[-1])
        return weights[0], weights[1], middle.flatten().to(device)
