"""Which keys an EVA query sees exactly, and how the rest is cut into chunks.

Two rules. "exclusive" (`exclusive.py`): chunks fit the windows, and a query reads the chunks that its window does
not touch, so that every key counts exactly once. "published" (`published.py`): the official layout, in which a
query reads all chunks, also those that its window covers, and an overlapping window widens the chunks as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError, UnsupportedError
from ..layout import Blocks, pad_tokens
from ..limits import check_counts
from ..tokens import Tokens

CHUNKINGS = ("exclusive", "published")
OVERLAP_SIDES = ("both", "left")


def integer_root(number: int) -> int:
    """`math.isqrt`, which cannot be traced with sizes of tensors."""
    root = 0
    while (root + 1) ** 2 <= number:
        root += 1
    return root


@dataclass(frozen=True)
class WindowedBlocks:
    """Blocks together with the tokens next to them: `left` before and `right` after, in every dimension."""

    blocks: Blocks
    left: int = 0
    right: int = 0

    def split(self, x: Tensor) -> Tensor:
        """`[..., tokens, dim]` -> `[..., blocks, slots, dim]`, zeros where there is no token."""
        blocks, left, right = self.blocks, self.left, self.right
        if not left and not right:
            return blocks.split(x)
        size, slots = blocks.size, left + blocks.size + right
        if blocks.grid is None:
            x = pad_tokens(x, left, -blocks.tokens % size + right)
            return x.unfold(-2, slots, size).transpose(-1, -2)
        (height, width) = blocks.grid
        x = F.pad(x.unflatten(-2, blocks.grid), (0, 0, left, -width % size + right, left, -height % size + right))
        x = x.unfold(-3, slots, size).unfold(-3, slots, size)  # [..., rows, columns, dim, slots, slots]
        return x.movedim(-3, -1).flatten(-3, -2).flatten(-4, -3)

    def real(self, mask: Tensor | None, device: torch.device) -> Tensor:
        """`[batch or 1, blocks, slots]`, True where there is a real token."""
        if mask is None:
            mask = torch.ones(1, self.blocks.tokens, dtype=torch.bool, device=device)
        return self.split(mask.unsqueeze(-1).to(torch.uint8)).squeeze(-1).bool()


@dataclass(frozen=True)
class Chunks:
    """All chunks and who reads them.

    take: `[batch, heads, tokens, dim]` -> `[batch, heads, chunks, members, dim]`, zeros where there is no member.
    member: `[batch or 1, chunks, members]`, True where there is one.
    visible: `[batch or 1, windows, queries or 1, chunks]`, or `None` if every query reads every chunk.
    hidden: The same as a range per window, where it is one: window w reads the chunks c < hidden[0][.., w] and
        c >= hidden[1][.., w]; `[batch or 1, windows]` each. `visible` is then derived.
    slots: By how many a sum is divided for the mean, `[batch or 1, 1]`; `None` for the number of members.
    count: Chunks that some query reads, of a row that is as long as the tensor.
    siblings: `[batch or 1, windows, n]`: windows that lie in a chunk which is partly seen, -1 for none; they are then
        read one by one instead of the chunk.
    """

    take: Callable[[Tensor], Tensor]
    member: Tensor
    visible: Tensor | None
    count: int
    slots: Tensor | None = None
    partly_seen_windows: Tensor | None = None
    hidden: tuple[Tensor, Tensor] | None = None

    def seen(self) -> Tensor | None:
        """`visible`, also where it follows from `hidden`."""
        if self.hidden is None:
            return self.visible
        number = torch.arange(self.member.shape[1], device=self.member.device)
        first, end = (z[..., None, None] for z in self.hidden)
        return (number < first) | (number >= end)


@dataclass(frozen=True)
class Layout:
    """`reach` `[batch, 1]`: how far the windows of each row reach, where that is less than `windows` says."""

    windows: WindowedBlocks
    chunks: Chunks | None
    reach: Tensor | None = None


@dataclass(frozen=True)
class ChunkOptions:
    """The options of `eva_attention` that decide about the layout."""

    window_size: int
    num_chunks: int
    chunk_size: int | None
    chunking: str
    overlap_side: str | None  # None: windows do not overlap
    is_causal: bool
    max_chunks: int | None = None

    def check(self, grid: tuple[int, int] | None) -> None:
        """Raises `InputError`, or `UnsupportedError` for what a layout cannot have."""
        window, chunk = self.window_size, self.chunk_size
        if window < 1 or self.num_chunks < 1:
            raise InputError(f"window_size and num_chunks must be >= 1; got {window!r} and {self.num_chunks!r}.")
        if self.chunking not in CHUNKINGS:
            raise InputError(f"chunking must be one of {list(CHUNKINGS)}; got {self.chunking!r}.")
        if self.overlap_side not in (None, *OVERLAP_SIDES):
            raise InputError(f"overlap_side must be one of {list(OVERLAP_SIDES)} or None; got {self.overlap_side!r}.")
        if self.is_causal and self.overlap_side == "both":
            raise UnsupportedError("A causal window reaches to the left only; got overlap_side='both'. Pass None.")
        if grid is not None and self.overlap_side == "left":
            raise UnsupportedError("overlap_side='left' needs a sequence, not an image. Pass 'both', or grid=None.")
        if self.max_chunks is not None:
            check_counts({"max_chunks": self.max_chunks}, or_none=True)
            if not self.is_causal or self.chunking != "exclusive":
                raise UnsupportedError(
                    "max_chunks needs the causal form with chunking='exclusive', where chunks have an age; got"
                    f" max_chunks={self.max_chunks!r}, is_causal={self.is_causal!r} and chunking={self.chunking!r}."
                    " Pass None."
                )
        if chunk is None:
            return
        if self.is_causal and (chunk < 1 or window % chunk):
            raise InputError(f"chunk_size must divide window_size in the causal form; got {chunk!r} and {window!r}.")
        if chunk < 1 or (self.chunking == "exclusive" and window % chunk and chunk % window):
            raise InputError(
                f"chunk_size must be >= 1 and, with chunking='exclusive', divide window_size or be a multiple of it;"
                f" got {chunk!r} and {window!r}."
            )


def default_chunk(window_size: int) -> int:
    """Tokens of a chunk in the causal form: the largest divisor of the window up to 16.

    One mean key and one value for 16 pairs of them: with the window still less than an eighth of a cache of all keys
    and values, from 2048 tokens on. A window without a divisor from 8 to 16 takes the next larger one, if it has one.
    """
    divisors = [c for c in range(1, window_size + 1) if window_size % c == 0]
    best = max(c for c in divisors if c <= 16)
    return best if best >= 8 else min((c for c in divisors if c > 16), default=best)


def nominal_reach(window_size: int, chunking: str, to_the_left: bool) -> int:
    """How far an overlapping window reaches at most, whatever the length of the input."""
    return window_size if to_the_left or chunking == "exclusive" else max(1, window_size // 2)


def even_chunks(
    around: WindowedBlocks,
    tokens: Tokens,
    visible: Tensor | None,
    partly_seen_windows: Tensor | None,
    slots: Tensor | None = None,
    hidden: tuple[Tensor, Tensor] | None = None,
    count: int | None = None,
) -> Chunks:
    """Chunks that are the same for all rows. They may cover fewer tokens than there are, or more."""
    extra = around.blocks.tokens - tokens.y.shape[2]

    def take(z: Tensor) -> Tensor:
        return around.split(pad_tokens(z, 0, extra))

    real = tokens.y.new_ones(1, tokens.y.shape[2]) if tokens.valid is None else tokens.valid
    member = take(real.to(torch.uint8).unsqueeze(-1)).squeeze(-1).bool()
    return Chunks(take, member, visible, count or around.blocks.num_blocks, slots, partly_seen_windows, hidden)
