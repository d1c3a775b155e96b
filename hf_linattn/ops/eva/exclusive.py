"""EVA with every key counted exactly once: chunks fit the windows, and a query reads those its window does not touch.

Of a chunk that is longer than a window and only partly seen, the other windows are read one by one
(`partly_seen_windows`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..layout import Blocks, WindowedBlocks, fit_window, gather_tokens
from ..padding import Tokens
from ..tracing import outside_tracing
from .layout import ChunkOptions, Chunks, Layout, even_chunks, integer_root


def chunk_length(window_size: int, num_chunks: int, tokens: Tensor) -> Tensor:
    """The shortest chunk length that gives at most `num_chunks` chunks and fits the windows (element-wise over
    `tokens`).

    It divides `window_size`, or is a multiple of it.
    """
    wanted = (-(-tokens // num_chunks)).clamp_min(1)
    # Made where the tokens are: a list of the divisors would have to be copied to a GPU in every call.
    number = torch.arange(1, window_size + 1, device=tokens.device)
    fits = (window_size % number == 0) & (number >= wanted[..., None])
    within = torch.where(fits, number, window_size).amin(-1)
    return torch.where(wanted <= window_size, within, -(-wanted // window_size) * window_size)


def longest_chunk(window_size: int, num_chunks: int, tokens: int) -> int:
    """`chunk_length` of one row, as an integer: known while tracing."""
    wanted = max(1, -(-tokens // num_chunks))
    if wanted > window_size:
        return -(-wanted // window_size) * window_size
    while window_size % wanted:
        wanted += 1
    return wanted


def window_reach(window_size: int, chunk: int) -> int:
    """How far an overlapping window reaches beyond each side: half a window, rounded up to whole chunks.

    A whole window if chunks are longer than a window.
    """
    return window_size if chunk > window_size else -(-max(1, window_size // 2) // chunk) * chunk


def exclusive_layout(options: ChunkOptions, tokens: Tokens, *, always_chunks: bool = False) -> Layout:
    """Windows and chunks that share no key, row by row.

    Args:
        always_chunks: Make chunks also where one window holds all tokens, so that no query reads any.
    """
    num_tokens, grid, device = tokens.key.shape[2], tokens.grid, tokens.key.device
    window = options.window_size if always_chunks else fit_window(options.window_size, num_tokens, grid)
    windows = Blocks(num_tokens, window, grid)
    if windows.num_blocks == 1 and not always_chunks:
        return Layout(WindowedBlocks(windows), None)
    if grid is not None:
        chunk = options.chunk_size or longest_chunk(window, max(1, integer_root(options.num_chunks)), max(grid))
        reach = window_reach(window, chunk) if options.overlap_side else 0
        visible, partly_seen = grid_table(*grid, window, chunk, reach, str(device))
        chunks = even_chunks(WindowedBlocks(Blocks(num_tokens, chunk, grid)), tokens, visible, partly_seen)
        return Layout(WindowedBlocks(windows, reach, reach), chunks)

    chunk = options.chunk_size or longest_chunk(window, options.num_chunks, num_tokens)
    if options.chunk_size or tokens.valid is None:
        left, right, _ = reaches(options.overlap_side, window, chunk)
        blocks, number = Blocks(num_tokens, chunk), torch.arange(windows.num_blocks, device=device)
        length, partly_seen = torch.full((1, 1), chunk, device=device), None
        unread_range = unread_chunks(options, number, window, length, blocks.num_blocks, left, right)
        if chunk > window:
            partly_seen = partly_seen_windows(options, number, windows.num_blocks, length // window, chunk // window)
        # No query ever reads the chunks of the last window, if causal.
        count = (windows.num_blocks - 1) * (window // chunk) if options.is_causal else None
        around = WindowedBlocks(blocks)
        chunks = even_chunks(around, tokens, None, partly_seen, unread_range=unread_range, count=count)
        return Layout(WindowedBlocks(windows, left, right), chunks)
    return _exclusive_rows(options, tokens, windows, chunk)


def _exclusive_rows(options: ChunkOptions, tokens: Tokens, windows: Blocks, longest: int) -> Layout:
    """Rows of different length have chunks of different length, `longest` at most."""
    num_tokens, device, window = tokens.key.shape[2], tokens.key.device, windows.size
    length = chunk_length(window, options.num_chunks, tokens.lengths)[:, None]  # [batch, 1]
    start = torch.arange(min(options.num_chunks, num_tokens), device=device) * length
    position = start[..., None] + torch.arange(longest, device=device)
    inside = (position < (start + length)[..., None]) & (position < tokens.lengths[:, None, None])
    left, right, reach = reaches(options.overlap_side, window, longest, length)
    own_reaches = (left, right) if reach is None else (reach, reach)
    number = torch.arange(windows.num_blocks, device=device)
    unread_range = unread_chunks(options, number, window, length, start.shape[1], *own_reaches)
    partly_seen = None
    if longest > window:
        per_chunk = (length // window).clamp_min(1)
        partly_seen = partly_seen_windows(options, number, windows.num_blocks, per_chunk, longest // window)
    index = torch.where(inside, position, -1)
    count = -(-num_tokens // longest)
    chunks = Chunks(lambda z: gather_tokens(z, index), inside, None, count, None, partly_seen, unread_range)
    return Layout(WindowedBlocks(windows, left, right), chunks, reach)


def reaches(
    overlap_side: str | None, window_size: int, longest: int, length: Tensor | None = None
) -> tuple[int, int, Tensor | None]:
    """How far windows reach before and after their block at most, and how far those of each row, where that differs.

    Args: longest: Tokens of the longest chunks. length: `[batch, 1]`, those of a row's; `None`: all rows' are as long.
    """
    if overlap_side is None:
        return 0, 0, None
    if overlap_side == "left":
        return window_size, 0, None
    if length is None:
        reach = window_reach(window_size, longest)
        return reach, reach, None
    most, half = longest_reach(window_size, longest), max(1, window_size // 2)
    reach_of_rows = torch.where(length > window_size, window_size, (half + length - 1) // length * length)
    return most, most, reach_of_rows


def longest_reach(window_size: int, longest: int) -> int:
    """The largest `window_reach` of rows with chunks of at most `longest` tokens."""
    lengths = [longest, *(c for c in _divisors(window_size) if c < longest)]
    return max(window_reach(window_size, c) for c in lengths)


def _divisors(window: int) -> list[int]:
    return [d for d in range(1, window + 1) if window % d == 0]


def unread_chunks(
    options: ChunkOptions,
    number: Tensor,
    window_size: int,
    length: Tensor,
    count: int,
    left: int | Tensor,
    right: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """The first chunk that a window does not read, because it sees some of it, and the first after those it sees.

    Args: number: `[windows]`, from 0. length: `[batch or 1, 1]`, tokens of a chunk.
    Returns: twice `[batch or 1, windows]`; the second is `count` if causal, where nothing later is read.
    """
    first = number[None] * window_size
    start = (first - left).clamp_min(0) // length
    if options.is_causal:
        return start, torch.full_like(start, count)
    return start, (first + window_size + right + length - 1) // length


def partly_seen_windows(
    options: ChunkOptions, number: Tensor, num_windows: int, per_chunk: Tensor, most: int
) -> Tensor:
    """`[batch or 1, windows, n]`: windows in the chunks that a window's reach cuts, not those it sees; -1 for none.

    Args: number: `[windows]`, from 0, of `num_windows`. per_chunk: `[batch or 1, 1]`, windows of a chunk; `most` at
        most.
    """
    left, right = int(options.overlap_side is not None), int(options.overlap_side == "both")
    first = (number - left).clamp_min(0) // per_chunk * per_chunk
    stop = ((number + right).clamp_max(num_windows - 1) // per_chunk + 1) * per_chunk
    other = first[..., None] + torch.arange(most * (2 if left else 1), device=number.device)
    seen = (other >= (number - left)[:, None]) & (other <= (number + right)[:, None])
    return torch.where(seen | (other >= stop[..., None]) | (other >= num_windows), -1, other)


@torch.compiler.assume_constant_result
def grid_table(
    height: int, width: int, window: int, chunk: int, reach: int, device: str
) -> tuple[Tensor, Tensor | None]:
    """(`visible`, `partly_seen_windows`) of the exclusive chunks of an image, as in `Chunks`.

    A function of plain values, so `torch.compile` takes it as a constant.
    """
    return _grid_table((height, width), window, chunk, reach, device)


@functools.lru_cache(maxsize=64)
def _grid_table(
    grid: tuple[int, int], window: int, chunk: int, reach: int, device: str
) -> tuple[Tensor, Tensor | None]:
    tokens = grid[0] * grid[1]

    def membership(around: WindowedBlocks) -> Tensor:  # [blocks, tokens]
        index = around.split(torch.arange(1, tokens + 1).unsqueeze(-1)).squeeze(-1)
        return torch.zeros(len(index), tokens + 1).scatter_(1, index, 1.0)[:, 1:]

    with outside_tracing():
        windows = Blocks(tokens, window, grid)
        alone, seen = membership(WindowedBlocks(windows)), membership(WindowedBlocks(windows, reach, reach))
        chunks = membership(WindowedBlocks(Blocks(tokens, chunk, grid)))
        touched = seen @ chunks.T > 0  # [windows, chunks]
        visible = (~touched[None, :, None]).to(device)
        if chunk <= window:
            return visible, None
        around = (touched.float() @ chunks @ alone.T > 0) & ~(seen @ alone.T > 0)
        if not around.any():
            return visible, None
        partly_seen_windows = torch.full((windows.num_blocks, int(around.sum(-1).max())), -1)
        for number, row in enumerate(around):
            members = row.nonzero().squeeze(-1)
            partly_seen_windows[number, : len(members)] = members
        return visible, partly_seen_windows[None].to(device)
