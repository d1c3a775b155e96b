"""How tokens are cut up: padding taken out, global tokens split off, blocks in one or two dimensions.

The rule for padding is that a row is treated as if it had been given without it. So the first step of every kind that
looks at positions is `compact`, which moves the real tokens of each row to its front; everything after that only needs
the number of real tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError


@dataclass(frozen=True)
class Compaction:
    """Where the real tokens went, to put the results back.

    `valid` is `[batch, tokens]`: True for the first `lengths[b]` tokens. `None` fields mean there was no mask.
    """

    order: Tensor | None
    valid: Tensor | None
    mask: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        """Real tokens of `x` `[batch, heads, tokens, dim]` first, in their order; padding is set to 0."""
        if self.order is None or self.valid is None:
            return x
        moved = x.gather(2, self.order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))
        # Zeroed with a `where`, so that whatever stood in the padding (even inf or NaN) reaches neither values nor
        # gradients.
        return moved.masked_fill(~self.valid[:, None, :, None], 0.0)

    def restore(self, x: Tensor) -> Tensor:
        """Inverse of `apply`; zeros at padding."""
        if self.order is None or self.mask is None:
            return x
        rank = self.order.argsort(dim=-1)
        moved = x.gather(2, rank[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))
        return moved.masked_fill(~self.mask[:, None, :, None], 0.0)


def compact(mask: Tensor | None) -> Compaction:
    """Plan to move the real tokens of every row to its front. `mask` is `[batch, tokens]`, True = real."""
    if mask is None:
        return Compaction(None, None, None)
    order = mask.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    return Compaction(order, mask.gather(1, order), mask)


def check_grid(tokens: int, grid: tuple[int, int], mask: Tensor | None) -> None:
    """A 2-D layout needs exactly `height * width` tokens, all of them real."""
    if grid[0] * grid[1] != tokens:
        raise InputError(
            f"A grid of {grid[0]} x {grid[1]} patches needs {grid[0] * grid[1]} tokens after the global ones; got"
            f" {tokens}. Pass the grid of these images, or grid=None to treat the tokens as a sequence."
        )
    if mask is None:
        return
    must = "A mask over a 2-D grid must be all True (a full rectangle of patches)"
    advice = "Pass grid=None to treat the tokens as a sequence."
    if torch.compiler.is_compiling():  # when the graph runs
        torch._assert_async(mask.all(), f"hf_linattn: {must}. {advice}")
    elif not bool(mask.all()):
        raise InputError(f"{must}; got one with {int((~mask).sum())} masked patches. {advice}")


def fit_window(window_size: int, tokens: int, grid: tuple[int, int] | None) -> int:
    """A window larger than the input, cut down to the one block that it is."""
    return min(window_size, max(1, *(grid or (tokens,))))


@dataclass(frozen=True)
class Blocks:
    """Cuts tokens into blocks of equal size, padding the last ones.

    Args:
        tokens: Number of tokens.
        size: Tokens per block; with a `grid` the side of a square block.
        grid: Height and width if the tokens are the cells of an image, row by row.
    """

    tokens: int
    size: int
    grid: tuple[int, int] | None = None

    @property
    def _padded(self) -> tuple[int, ...]:
        return tuple(-(-n // self.size) * self.size for n in (self.grid or (self.tokens,)))

    @property
    def num_blocks(self) -> int:
        count = 1
        for n in self._padded:
            count *= n // self.size
        return count

    def split(self, x: Tensor) -> Tensor:
        """`[..., tokens, dim]` -> `[..., blocks, tokens per block, dim]`, zeros where a block has no token."""
        if self.grid is None:
            return pad_tokens(x, 0, self._padded[0] - self.tokens).unflatten(-2, (self.num_blocks, self.size))
        (height, width), (rows, columns), size = self.grid, self._padded, self.size
        x = F.pad(x.unflatten(-2, (height, width)), (0, 0, 0, columns - width, 0, rows - height))
        x = x.unflatten(-3, (rows // size, size)).unflatten(-2, (columns // size, size)).transpose(-3, -4)
        return x.flatten(-5, -4).flatten(-3, -2)

    def join(self, x: Tensor) -> Tensor:
        """Inverse of `split`."""
        if self.grid is None:
            return x.flatten(-3, -2)[..., : self.tokens, :]
        (height, width), (rows, columns), size = self.grid, self._padded, self.size
        x = x.unflatten(-2, (size, size)).unflatten(-4, (rows // size, columns // size)).transpose(-3, -4)
        return x.flatten(-3, -2).flatten(-4, -3)[..., :height, :width, :].flatten(-3, -2)

    def real(self, mask: Tensor | None, device: torch.device) -> Tensor:
        """`[batch or 1, blocks, tokens per block]`, True where a block has a real token."""
        if mask is None:
            mask = torch.ones(1, self.tokens, dtype=torch.bool, device=device)
        return self.split(mask.unsqueeze(-1).to(torch.uint8)).squeeze(-1).bool()

    def index(self, device: torch.device) -> Tensor:
        """`[blocks, tokens per block]`: which token stands where, -1 where none does."""
        numbers = torch.arange(1, self.tokens + 1, device=device).unsqueeze(-1)
        return self.split(numbers).squeeze(-1) - 1


def pad_tokens(x: Tensor, before: int, after: int) -> Tensor:
    """`x` `[..., tokens, dim]` with zeros before and after; without the last tokens if `after` is negative."""
    return F.pad(x, (0, 0, before, after)) if before or after else x


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Pick tokens: `x` `[batch, heads, tokens, dim]`, `index` `[batch or 1, groups, members]` -> `[batch, heads,
    groups, members, dim]`.

    Negative entries of `index` stand for "no token" and give zeros.
    """
    flat = index.clamp_min(0).flatten(1).expand(x.shape[0], -1)
    picked = x.gather(2, flat[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))
    picked = picked.masked_fill((index.flatten(1) < 0)[:, None, :, None], 0.0)
    return picked.unflatten(2, tuple(index.shape[1:]))


def masked_mean(x: Tensor, member: Tensor) -> Tensor:
    """Mean over the second to last dimension of the members; 0 for a group without any.

    Args:
        x: `[batch, heads, groups, members, dim]`, zeros where there is no member.
        member: `[batch or 1, groups, members]` bool.
    """
    count = member.sum(-1).clamp_min(1).to(x.dtype)
    return x.sum(-2) / count[:, None, :, None]


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


def grid_bins(grid: tuple[int, int], bins: int, device: torch.device) -> Tensor:
    """Adaptive average pooling as an index: `bins x bins` rectangles that cover the grid and may share cells.

    Bin `(r, c)` holds rows `floor(r H / bins) .. ceil((r + 1) H / bins) - 1` and columns likewise.
    Returns: `[1, bins * bins, members]`, -1 padded.
    """
    height, width = grid
    cells = []
    for r in range(bins):
        rows = range(r * height // bins, -(-(r + 1) * height // bins))
        for c in range(bins):
            columns = range(c * width // bins, -(-(c + 1) * width // bins))
            cells.append([row * width + column for row in rows for column in columns])
    longest = max(len(cell) for cell in cells)
    return torch.tensor([[*cell, *[-1] * (longest - len(cell))] for cell in cells], device=device).unsqueeze(0)
