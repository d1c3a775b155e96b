"""Which keys an EVA query sees exactly, and how the rest is cut into chunks.

Two rules. "exclusive": chunks fit the windows, and a query reads the chunks that its window does not touch, so that
every key counts exactly once. "published": the official layout, in which a query reads all chunks, also those that its
window covers, and an overlapping window widens the chunks as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, UnsupportedError
from .layout import Blocks, fit_window, gather_tokens
from .tokens import Tokens

CHUNKINGS = ("exclusive", "published")
OVERLAP_SIDES = ("both", "left")


@dataclass(frozen=True)
class Surroundings:
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
            x = F.pad(x, (0, 0, left, -blocks.tokens % size + right))
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
    slots: By how many a sum is divided for the mean, `[batch or 1, 1]`; `None` for the number of members.
    count: Chunks of a row that is as long as the tensor.
    siblings: `[batch or 1, windows, n]`: windows that lie in a chunk which is partly seen, -1 for none; they are then
        read one by one instead of the chunk.
    """

    take: Callable[[Tensor], Tensor]
    member: Tensor
    visible: Tensor | None
    count: int
    slots: Tensor | None = None
    siblings: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """`reach` `[batch, 1]`: how far the windows of each row reach, where that is less than `windows` says."""

    windows: Surroundings
    chunks: Chunks | None
    reach: Tensor | None = None


@dataclass(frozen=True)
class Cutting:
    """The options of `eva_attention` that decide about the layout."""

    window_size: int
    num_chunks: int
    chunk_size: int | None
    chunking: str
    overlap_side: str | None  # None: windows do not overlap
    is_causal: bool

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
        if chunk is None:
            return
        if self.is_causal and (chunk < 1 or window % chunk):
            raise InputError(f"chunk_size must divide window_size in the causal form; got {chunk!r} and {window!r}.")
        if chunk < 1 or (self.chunking == "exclusive" and window % chunk and chunk % window):
            raise InputError(
                f"chunk_size must be >= 1 and, with chunking='exclusive', divide window_size or be a multiple of it;"
                f" got {chunk!r} and {window!r}."
            )

    def layout(self, tokens: Tokens) -> Layout:
        """The layout of these tokens, row by row."""
        if self.chunking == "published":
            return _published(self, tokens)
        return _exclusive(self, tokens)


# -- every key once --------------------------------------------------------------------------------------------------


def chunk_length(window_size: int, num_chunks: int, tokens: Tensor) -> Tensor:
    """The shortest chunk length that gives at most `num_chunks` chunks and fits the windows (element-wise over
    `tokens`).

    It divides `window_size`, or is a multiple of it.
    """
    divisors = torch.tensor([d for d in range(1, window_size + 1) if window_size % d == 0], device=tokens.device)
    wanted = (-(-tokens // num_chunks)).clamp_min(1)
    within = divisors[torch.searchsorted(divisors, wanted.clamp_max(window_size))]
    return torch.where(wanted <= window_size, within, -(-wanted // window_size) * window_size)


def longest_chunk(window_size: int, num_chunks: int, tokens: int) -> int:
    """`chunk_length` of one row, as an integer: known while tracing."""
    wanted = max(1, -(-tokens // num_chunks))
    if wanted > window_size:
        return -(-wanted // window_size) * window_size
    return next(d for d in range(wanted, window_size + 1) if window_size % d == 0)


def window_reach(window_size: int, chunk: int) -> int:
    """How far an overlapping window reaches beyond each side: half a window, rounded up to whole chunks.

    A whole window if chunks are longer than a window.
    """
    return window_size if chunk > window_size else -(-max(1, window_size // 2) // chunk) * chunk


def _exclusive(cut: Cutting, tokens: Tokens) -> Layout:
    num_tokens, grid, device = tokens.y.shape[2], tokens.grid, tokens.y.device
    window = fit_window(cut.window_size, num_tokens, grid)
    windows = Blocks(num_tokens, window, grid)
    if windows.num_blocks == 1:
        return Layout(Surroundings(windows), None)
    if grid is not None:
        chunk = cut.chunk_size or longest_chunk(window, max(1, math.isqrt(cut.num_chunks)), max(grid))
        reach = window_reach(window, chunk) if cut.overlap_side else 0
        visible, siblings = grid_table(*grid, window, chunk, reach, str(device))
        chunks = _even_chunks(Surroundings(Blocks(num_tokens, chunk, grid)), tokens, visible, siblings)
        return Layout(Surroundings(windows, reach, reach), chunks)

    chunk = cut.chunk_size or longest_chunk(window, cut.num_chunks, num_tokens)
    left = right = 0
    if cut.overlap_side == "left":
        left = window
    elif cut.overlap_side:
        left = right = window_reach(window, chunk)
    if cut.chunk_size or tokens.valid is None:
        # Only chunks of complete windows are ever visible to a causal query, so the last window needs none.
        covered = (windows.num_blocks - 1) * window if cut.is_causal else num_tokens
        blocks = Blocks(covered, chunk)
        start = torch.arange(blocks.num_blocks, device=device)[None] * chunk
        visible = _untouched(cut, windows, start, start + chunk, left, right)
        siblings = None
        if chunk > window:
            siblings = _siblings(windows, torch.full((1, 1), chunk // window, device=device), chunk // window, cut)
        chunks = _even_chunks(Surroundings(blocks), tokens, visible, siblings)
        return Layout(Surroundings(windows, left, right), chunks)
    return _exclusive_rows(cut, tokens, windows, chunk)


def _exclusive_rows(cut: Cutting, tokens: Tokens, windows: Blocks, longest: int) -> Layout:
    """Rows of different length have chunks of different length, `longest` at most."""
    num_tokens, device, window = tokens.y.shape[2], tokens.y.device, windows.size
    length = chunk_length(window, cut.num_chunks, tokens.lengths)[:, None]  # [batch, 1]
    start = torch.arange(min(cut.num_chunks, num_tokens), device=device) * length
    position = start[..., None] + torch.arange(longest, device=device)
    inside = (position < (start + length)[..., None]) & (position < tokens.lengths[:, None, None])
    left = right = 0
    reach = None
    if cut.overlap_side == "left":
        left = window
    elif cut.overlap_side:
        left = right = max(window_reach(window, c) for c in {*_divisors(window, longest), longest})
        half = max(1, window // 2)
        reach = torch.where(length > window, window, (half + length - 1) // length * length)
    near = (left, right) if reach is None else (reach, reach)
    visible = _untouched(cut, windows, start, start + length, *near)
    siblings = None
    if longest > window:
        siblings = _siblings(windows, (length // window).clamp_min(1), longest // window, cut)
    index = torch.where(inside, position, -1)
    count = -(-num_tokens // longest)
    chunks = Chunks(lambda z: gather_tokens(z, index), inside, visible, count, siblings=siblings)
    return Layout(Surroundings(windows, left, right), chunks, reach)


def _divisors(window: int, longest: int) -> list[int]:
    return [d for d in range(1, min(window, longest) + 1) if window % d == 0]


def _untouched(
    cut: Cutting, windows: Blocks, start: Tensor, end: Tensor, left: int | Tensor, right: int | Tensor
) -> Tensor:
    """Chunks `[batch or 1, chunks]` that lie outside of what a window sees (before it, if causal)."""
    first = torch.arange(windows.num_blocks, device=start.device)[None] * windows.size
    before = end[:, None] <= (first - left)[..., None]
    if not cut.is_causal:
        before = before | (start[:, None] >= (first + windows.size + right)[..., None])
    return before.unsqueeze(2)


def _siblings(windows: Blocks, per_chunk: Tensor, most: int, cut: Cutting) -> Tensor:
    """Windows in the chunks that a window's reach cuts, without those it sees; `per_chunk` `[batch or 1, 1]`."""
    own = torch.arange(windows.num_blocks, device=per_chunk.device)
    left, right = int(cut.overlap_side is not None), int(cut.overlap_side == "both")
    first = (own - left).clamp_min(0) // per_chunk * per_chunk
    stop = ((own + right).clamp_max(windows.num_blocks - 1) // per_chunk + 1) * per_chunk
    number = first[..., None] + torch.arange(most * (2 if left else 1), device=own.device)
    seen = (number >= (own - left)[:, None]) & (number <= (own + right)[:, None])
    return torch.where(seen | (number >= stop[..., None]) | (number >= windows.num_blocks), -1, number)


def _even_chunks(
    around: Surroundings, tokens: Tokens, visible: Tensor | None, siblings: Tensor | None, slots: Tensor | None = None
) -> Chunks:
    """Chunks that are the same for all rows. They may cover fewer tokens than there are, or more."""
    extra = around.blocks.tokens - tokens.y.shape[2]

    def take(z: Tensor) -> Tensor:
        return around.split(F.pad(z, (0, 0, 0, extra)) if extra > 0 else z[..., : around.blocks.tokens, :])

    real = tokens.y.new_ones(1, tokens.y.shape[2]) if tokens.valid is None else tokens.valid
    member = take(real.to(torch.uint8).unsqueeze(-1)).squeeze(-1).bool()
    return Chunks(take, member, visible, around.blocks.num_blocks, slots, siblings)


@torch.compiler.assume_constant_result
def grid_table(
    height: int, width: int, window: int, chunk: int, reach: int, device: str
) -> tuple[Tensor, Tensor | None]:
    """(`visible`, `siblings`) of the exclusive chunks of an image, as in `Chunks`.

    A function of plain values, so `torch.compile` takes it as a constant.
    """
    visible, siblings = _grid_table((height, width), window, chunk, reach)
    return visible.to(device), siblings if siblings is None else siblings.to(device)


@functools.lru_cache(maxsize=64)
def _grid_table(grid: tuple[int, int], window: int, chunk: int, reach: int) -> tuple[Tensor, Tensor | None]:
    tokens = grid[0] * grid[1]

    def membership(around: Surroundings) -> Tensor:  # [blocks, tokens]
        index = around.split(torch.arange(1, tokens + 1).unsqueeze(-1)).squeeze(-1)
        return torch.zeros(len(index), tokens + 1).scatter_(1, index, 1.0)[:, 1:]

    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        windows = Blocks(tokens, window, grid)
        alone, seen = membership(Surroundings(windows)), membership(Surroundings(windows, reach, reach))
        chunks = membership(Surroundings(Blocks(tokens, chunk, grid)))
        touched = seen @ chunks.T > 0  # [windows, chunks]
        visible = ~touched[None, :, None]
        if chunk <= window:
            return visible, None
        around = (touched.float() @ chunks @ alone.T > 0) & ~(seen @ alone.T > 0)
        siblings = torch.full((windows.num_blocks, int(around.sum(-1).max())), -1)
        for number, row in enumerate(around):
            members = row.nonzero().squeeze(-1)
            siblings[number, : len(members)] = members
        return visible, siblings[None]


# -- as published ----------------------------------------------------------------------------------------------------


def _published(cut: Cutting, tokens: Tokens) -> Layout:
    window, num_tokens, grid = cut.window_size, tokens.y.shape[2], tokens.grid
    side = max(1, window // 2)
    left, right = {None: (0, 0), "left": (window, 0), "both": (side, side)}[cut.overlap_side]
    windows = Surroundings(Blocks(num_tokens, window, grid), left, right)
    wider = right  # chunks grow with windows that reach to both sides
    if grid is not None:
        chunk = cut.chunk_size or max(1, math.isqrt(num_tokens // cut.num_chunks))
        around = Surroundings(Blocks(num_tokens, chunk, grid), wider, wider)
        slots = torch.full((1, 1), (chunk + 2 * wider) ** 2, device=tokens.y.device)
        return Layout(windows, _even_chunks(around, tokens, None, None, slots))

    padded = -(-num_tokens // window) * window
    longest = cut.chunk_size or max(1, padded // cut.num_chunks)
    count = -(-padded // longest)
    if tokens.valid is None:
        around = Surroundings(Blocks(padded, longest), wider, wider)
        length = torch.full((1, 1), longest, device=tokens.y.device)
        visible = _earlier(cut, windows.blocks, length, count) if cut.is_causal else None
        return Layout(windows, _even_chunks(around, tokens, visible, None, length + 2 * wider))

    # Rows of different length: each is padded to whole windows of its own, and cut into chunks of its own length.
    own = -(-tokens.lengths[:, None] // window) * window  # [batch, 1]
    length = own * 0 + cut.chunk_size if cut.chunk_size else (own // cut.num_chunks).clamp_min(1)
    most = count if cut.chunk_size else _most_chunks(window, cut.num_chunks, padded)
    number = torch.arange(most, device=own.device)
    visible = (number < -(-own // length))[:, None, None]
    if cut.is_causal:
        visible = visible & _earlier(cut, windows.blocks, length, most)
    position = (number * length)[..., None] - wider + torch.arange(longest + 2 * wider, device=own.device)
    inside = position < ((number + 1) * length + wider)[..., None]
    inside = inside & (position >= 0) & (position < tokens.lengths[:, None, None])
    index = torch.where(inside, position, -1)
    chunks = Chunks(lambda z: gather_tokens(z, index), inside, visible, count, slots=length + 2 * wider)
    return Layout(windows, chunks)


def _earlier(cut: Cutting, windows: Blocks, length: Tensor, count: int) -> Tensor:
    """`[batch or 1, windows, queries, chunks]`: chunks before the query's own; `length` `[batch or 1, 1]`."""
    device = length.device
    own = torch.arange(windows.num_blocks * windows.size, device=device) // length
    earlier = torch.arange(count, device=device) < own.unsqueeze(-1)
    return earlier.unflatten(1, (windows.num_blocks, windows.size))


@functools.lru_cache(maxsize=256)
def _most_chunks(window: int, num_chunks: int, padded: int) -> int:
    """The largest number of chunks that any row of at most `padded` tokens has."""
    lengths = range(window, min(padded, num_chunks**2) + 1, window)
    most = max((-(-n // max(1, n // num_chunks)) for n in lengths), default=0)
    return max(most, num_chunks + 1) if padded > num_chunks**2 else most  # longer rows have at most one more
