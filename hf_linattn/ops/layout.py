"""How tokens are cut up: into blocks in one or two dimensions, and picked by index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def fit_window(window_size: int, tokens: int, grid: tuple[int, int] | None) -> int:
    """A window larger than the input, cut down to the one block that it is."""
    return min(window_size, max(1, *(grid or (tokens,))))


class Blocks:
    """Cuts tokens into blocks of equal size, padding the last ones.

    Args:
        tokens: Number of tokens.
        size: Tokens per block; with a `grid` the side of a square block.
        grid: Height and width if the tokens are the patches of an image, row by row.
        per_group: `split` puts so many neighbouring blocks together as one, and adds empty blocks to the last.
    Attributes:
        members: Places of a block. num_blocks: Blocks of tokens. num_groups: What `split` gives.
        is_whole: Whether every place holds a token.
    """

    def __init__(self, tokens: int, size: int, grid: tuple[int, int] | None = None, per_group: int = 1) -> None:
        self.tokens, self.size, self.grid, self.per_group = tokens, size, grid, per_group
        if grid is None:
            self.rows, self.columns, self.members = 1, -(-tokens // size), size
        else:
            self.rows, self.columns, self.members = -(-grid[0] // size), -(-grid[1] // size), size**2
        self.num_blocks = self.rows * self.columns
        self.num_groups = -(-self.num_blocks // per_group)
        self.is_whole = self.num_groups * per_group * self.members == tokens

    def split(self, x: Tensor) -> Tensor:
        """`[..., tokens, dim]` -> `[..., groups, tokens of a group, dim]`, zeros where there is no token."""
        if self.grid is None:
            places = self.per_group * self.size
            padding = self.num_groups * places - self.tokens
            x = F.pad(x, (0, 0, 0, padding)) if padding else x
            return x.unflatten(-2, (self.num_groups, places))
        (height, width), rows, columns, size = self.grid, self.rows, self.columns, self.size
        x = F.pad(x.unflatten(-2, self.grid), (0, 0, 0, columns * size - width, 0, rows * size - height))
        x = x.unflatten(-3, (rows, size)).unflatten(-2, (columns, size)).transpose(-3, -4)
        x = x.flatten(-5, -4).flatten(-3, -2)
        padding = self.num_groups * self.per_group - self.num_blocks
        x = F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x
        return x if self.per_group == 1 else x.unflatten(-3, (-1, self.per_group)).flatten(-3, -2)

    def join(self, x: Tensor) -> Tensor:
        """Inverse of `split`."""
        if self.grid is None:
            return x.flatten(-3, -2)[..., : self.tokens, :]
        (height, width), size = self.grid, self.size
        if self.per_group > 1:
            x = x.unflatten(-2, (self.per_group, self.members)).flatten(-4, -3)[..., : self.num_blocks, :, :]
        x = x.unflatten(-2, (size, size)).unflatten(-4, (self.rows, self.columns)).transpose(-3, -4)
        return x.flatten(-3, -2).flatten(-4, -3)[..., :height, :width, :].flatten(-3, -2)


@dataclass(frozen=True)
class WindowedBlocks:
    """Blocks together with the tokens next to them: `left` before and `right` after, in every dimension.

    has_neighbours: What is split has so many tokens more at its ends, those next to a part of a sequence; its blocks
        are whole.
    """

    blocks: Blocks
    left: int = 0
    right: int = 0
    has_neighbours: bool = False

    def split(self, x: Tensor) -> Tensor:
        """`[..., tokens, dim]` -> `[..., blocks, places, dim]`, zeros where there is no token."""
        blocks, left, right = self.blocks, self.left, self.right
        if not left and not right:
            return blocks.split(x)
        size, places = blocks.size, left + blocks.size + right
        if blocks.grid is None:
            if not self.has_neighbours:
                x = F.pad(x, (0, 0, left, -blocks.tokens % size + right))
            return x.unfold(-2, places, size).transpose(-1, -2)
        (height, width) = blocks.grid
        x = F.pad(x.unflatten(-2, blocks.grid), (0, 0, left, -width % size + right, left, -height % size + right))
        x = x.unfold(-3, places, size).unfold(-3, places, size)  # [..., rows, columns, dim, places, places]
        return x.movedim(-3, -1).flatten(-3, -2).flatten(-4, -3)

    def real(self, valid: Tensor | None, device: torch.device) -> Tensor:
        """`[batch or 1, blocks, places]`, True where there is a real token."""
        if valid is None:
            valid = torch.ones(1, self.blocks.tokens, dtype=torch.bool, device=device)
        return self.split(valid.unsqueeze(-1).to(torch.uint8)).squeeze(-1).bool()


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
