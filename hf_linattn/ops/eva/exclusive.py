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
    divisors = torch.tensor(_divisors(window_size), device=tokens.device)
    wanted = (-(-tokens // num_chunks)).clamp_min(1)
    within = divisors[torch.searchsorted(divisors, wanted.clamp_max(window_size))]
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
        visible, partly_seen_windows = grid_table(*grid, window, chunk, reach, str(device))
        chunks = even_chunks(WindowedBlocks(Blocks(num_tokens, chunk, grid)), tokens, visible, partly_seen_windows)
        return Layout(WindowedBlocks(windows, reach, reach), chunks)

    chunk = options.chunk_size or longest_chunk(window, options.num_chunks, num_tokens)
    left = right = 0
    if options.overlap_side == "left":
        left = window
    elif options.overlap_side:
        left = right = window_reach(window, chunk)
    if options.chunk_size or tokens.valid is None:
        blocks = Blocks(num_tokens, chunk)
        length, partly_seen_windows = torch.full((1, 1), chunk, device=device), None
        unread_range = _unread_range(options, windows, length, blocks.num_blocks, left, right)
        if chunk > window:
            partly_seen_windows = _partly_seen_windows(windows, length // window, chunk // window, options)
        # No query ever reads the chunks of the last window, if causal.
        count = (windows.num_blocks - 1) * (window // chunk) if options.is_causal else None
        around = WindowedBlocks(blocks)
        chunks = even_chunks(around, tokens, None, partly_seen_windows, unread_range=unread_range, count=count)
        return Layout(WindowedBlocks(windows, left, right), chunks)
    return _exclusive_rows(options, tokens, windows, chunk)


def _exclusive_rows(options: ChunkOptions, tokens: Tokens, windows: Blocks, longest: int) -> Layout:
    """Rows of different length have chunks of different length, `longest` at most."""
    num_tokens, device, window = tokens.key.shape[2], tokens.key.device, windows.size
    length = chunk_length(window, options.num_chunks, tokens.lengths)[:, None]  # [batch, 1]
    start = torch.arange(min(options.num_chunks, num_tokens), device=device) * length
    position = start[..., None] + torch.arange(longest, device=device)
    inside = (position < (start + length)[..., None]) & (position < tokens.lengths[:, None, None])
    left = right = 0
    reach = None
    if options.overlap_side == "left":
        left = window
    elif options.overlap_side:
        lengths = [longest, *(c for c in _divisors(window) if c < longest)]
        left = right = max(window_reach(window, c) for c in lengths)
        half = max(1, window // 2)
        reach = torch.where(length > window, window, (half + length - 1) // length * length)
    reaches = (left, right) if reach is None else (reach, reach)
    unread_range = _unread_range(options, windows, length, start.shape[1], *reaches)
    partly_seen_windows = None
    if longest > window:
        partly_seen_windows = _partly_seen_windows(
            windows, (length // window).clamp_min(1), longest // window, options
        )
    index = torch.where(inside, position, -1)
    count = -(-num_tokens // longest)
    chunks = Chunks(lambda z: gather_tokens(z, index), inside, None, count, None, partly_seen_windows, unread_range)
    return Layout(WindowedBlocks(windows, left, right), chunks, reach)


def _divisors(window: int) -> list[int]:
    return [d for d in range(1, window + 1) if window % d == 0]


def _unread_range(
    options: ChunkOptions, windows: Blocks, length: Tensor, count: int, left: int | Tensor, right: int | Tensor
) -> tuple[Tensor, Tensor]:
    """The first chunk that a window does not read, because it sees some of it, and the first after those it sees.

    Args: length: `[batch or 1, 1]`, tokens of a chunk.
    Returns: twice `[batch or 1, windows]`; the second is `count` if causal, where nothing later is read.
    """
    first = torch.arange(windows.num_blocks, device=length.device)[None] * windows.size
    start = (first - left).clamp_min(0) // length
    if options.is_causal:
        return start, torch.full_like(start, count)
    return start, (first + windows.size + right + length - 1) // length


def _partly_seen_windows(windows: Blocks, per_chunk: Tensor, most: int, options: ChunkOptions) -> Tensor:
    """Windows in the chunks that a window's reach cuts, without those it sees; `per_chunk` `[batch or 1, 1]`."""
    own = torch.arange(windows.num_blocks, device=per_chunk.device)
    left, right = int(options.overlap_side is not None), int(options.overlap_side == "both")
    first = (own - left).clamp_min(0) // per_chunk * per_chunk
    stop = ((own + right).clamp_max(windows.num_blocks - 1) // per_chunk + 1) * per_chunk
    number = first[..., None] + torch.arange(most * (2 if left else 1), device=own.device)
    seen = (number >= (own - left)[:, None]) & (number <= (own + right)[:, None])
    return torch.where(seen | (number >= stop[..., None]) | (number >= windows.num_blocks), -1, number)


@torch.compiler.assume_constant_result
def grid_table(
    height: int, width: int, window: int, chunk: int, reach: int, device: str
) -> tuple[Tensor, Tensor | None]:
    """(`visible`, `partly_seen_windows`) of the exclusive chunks of an image, as in `Chunks`.

    A function of plain values, so `torch.compile` takes it as a constant.
    """
    visible, partly_seen_windows = _grid_table((height, width), window, chunk, reach)
    with outside_tracing():
        return visible.to(device), None if partly_seen_windows is None else partly_seen_windows.to(device)


@functools.lru_cache(maxsize=64)
def _grid_table(grid: tuple[int, int], window: int, chunk: int, reach: int) -> tuple[Tensor, Tensor | None]:
    tokens = grid[0] * grid[1]

    def membership(around: WindowedBlocks) -> Tensor:  # [blocks, tokens]
        index = around.split(torch.arange(1, tokens + 1).unsqueeze(-1)).squeeze(-1)
        return torch.zeros(len(index), tokens + 1).scatter_(1, index, 1.0)[:, 1:]

    with outside_tracing():
        windows = Blocks(tokens, window, grid)
        alone, seen = membership(WindowedBlocks(windows)), membership(WindowedBlocks(windows, reach, reach))
        chunks = membership(WindowedBlocks(Blocks(tokens, chunk, grid)))
        touched = seen @ chunks.T > 0  # [windows, chunks]
        visible = ~touched[None, :, None]
        if chunk <= window:
            return visible, None
        around = (touched.float() @ chunks @ alone.T > 0) & ~(seen @ alone.T > 0)
        if not around.any():
            return visible, None
        partly_seen_windows = torch.full((windows.num_blocks, int(around.sum(-1).max())), -1)
        for number, row in enumerate(around):
            members = row.nonzero().squeeze(-1)
            partly_seen_windows[number, : len(members)] = members
        return visible, partly_seen_windows[None]
