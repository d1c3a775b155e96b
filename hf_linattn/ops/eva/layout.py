"""Which keys an EVA query sees exactly, and how the rest is cut into chunks.

Two rules. "exclusive" (`exclusive.py`): chunks fit the windows, and a query reads the chunks that its window does
not touch, so that every key counts exactly once. "published" (`published.py`): the official layout, in which a
query reads all chunks, also those that its window covers, and an overlapping window widens the chunks as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError, UnsupportedError
from ..inputs import check_counts
from ..layout import WindowedBlocks, masked_mean
from ..padding import Tokens

CHUNKINGS = ("exclusive", "published")
OVERLAP_SIDES = ("both", "left")


def integer_root(number: int) -> int:
    """`math.isqrt`, which cannot be traced with sizes of tensors."""
    root = 0
    while (root + 1) ** 2 <= number:
        root += 1
    return root


@dataclass(frozen=True)
class Chunks:
    """All chunks and who reads them.

    take: `[batch, heads, tokens, dim]` -> `[batch, heads, chunks, members, dim]`, zeros where there is no member.
    member: `[batch or 1, chunks, members]`, True where there is one.
    visible: `[batch or 1, windows, queries or 1, chunks]`, or `None` if every query reads every chunk.
    unread_range: The same as a range per window, where it is one: window w reads the chunks c < unread_range[0][.., w]
        and c >= unread_range[1][.., w]; `[batch or 1, windows]` each. `visible` is then derived.
    divisor: By how many a sum is divided for the mean, `[batch or 1, 1]`; `None` for the number of members.
    count: Chunks that some query reads, of a row that is as long as the tensor.
    partly_seen_windows: `[batch or 1, windows, n]`: windows that lie in a chunk which is partly seen, -1 for none;
        they are then read one by one instead of the chunk.
    """

    take: Callable[[Tensor], Tensor]
    member: Tensor
    visible: Tensor | None
    count: int
    divisor: Tensor | None = None
    partly_seen_windows: Tensor | None = None
    unread_range: tuple[Tensor, Tensor] | None = None

    def mean(self, x: Tensor) -> Tensor:
        """Means of chunks, from what `take` gives."""
        if self.divisor is None:
            return masked_mean(x, self.member)
        return x.sum(-2) / self.divisor[:, None, :, None]

    def seen(self) -> Tensor | None:
        """`visible`, also where it follows from `unread_range`."""
        return self.visible if self.unread_range is None else outside(self.unread_range, self.member.shape[1])


def outside(unread_range: tuple[Tensor, Tensor], count: int) -> Tensor:
    """`visible` of `count` chunks that follows from an `unread_range` (both as in `Chunks`)."""
    start, stop = unread_range
    number = torch.arange(count, device=start.device)
    return (number < start[..., None, None]) | (number >= stop[..., None, None])


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

    def window(self, num_global_tokens: int, grid: tuple[int, int] | None) -> dict[str, Any]:
        """Arguments of `in_one_window`; a window of 0 where every query reads every chunk."""
        return {
            "window_size": self.window_size if self.chunking == "exclusive" else 0,
            "overlap_window": self.overlap_side is not None,
            "is_causal": self.is_causal,
            "num_global_tokens": num_global_tokens,
            "grid": grid,
        }

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
    *,
    divisor: Tensor | None = None,
    unread_range: tuple[Tensor, Tensor] | None = None,
    count: int | None = None,
) -> Chunks:
    """Chunks that are the same for all rows. They may cover fewer tokens than there are, or more."""
    split = around.split if around.left or around.right else around.blocks.split
    missing = around.blocks.tokens - tokens.key.shape[2]

    def padded(z: Tensor) -> Tensor:
        return split(F.pad(z, (0, 0, 0, missing)))

    take: Callable[[Tensor], Tensor] = padded if missing else split
    real = tokens.key.new_ones(1, tokens.key.shape[2]) if tokens.valid is None else tokens.valid
    member = take(real.to(torch.uint8).unsqueeze(-1)).squeeze(-1).bool()
    count = count or around.blocks.num_blocks
    return Chunks(take, member, visible, count, divisor, partly_seen_windows, unread_range)
