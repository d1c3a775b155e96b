"""EVA's layout in the official code (`HKUNLP/efficient-attention`): every query reads every chunk.

The tokens are padded to whole windows and cut into chunks of `floor(tokens / num_chunks)`. Where the official code
refuses a length or leaves the last tokens out, there is one more chunk for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Blocks, WindowedBlocks, gather_tokens
from ..padding import Tokens
from .layout import ChunkOptions, Chunks, Layout, even_chunks, integer_root, nominal_reach


def published_layout(options: ChunkOptions, tokens: Tokens) -> Layout:
    """Windows and chunks as in the official code, row by row, without losing tokens where it does."""
    window, num_tokens, grid = options.window_size, tokens.key.shape[2], tokens.grid
    left = nominal_reach(window, options.chunking, options.overlap_side == "left") if options.overlap_side else 0
    right = left if options.overlap_side == "both" else 0
    windows = WindowedBlocks(Blocks(num_tokens, window, grid), left, right)
    wider = right  # chunks grow with windows that reach to both sides
    if grid is not None:
        chunk = options.chunk_size or max(1, integer_root(num_tokens // options.num_chunks))
        around = WindowedBlocks(Blocks(num_tokens, chunk, grid), wider, wider)
        divisor = torch.full((1, 1), (chunk + 2 * wider) ** 2, device=tokens.key.device)
        return Layout(windows, even_chunks(around, tokens, None, None, divisor=divisor))

    padded = -(-num_tokens // window) * window
    longest = options.chunk_size or max(1, padded // options.num_chunks)
    count = -(-padded // longest)
    if tokens.valid is None:
        around = WindowedBlocks(Blocks(padded, longest), wider, wider)
        length = torch.full((1, 1), longest, device=tokens.key.device)
        visible = earlier_chunks(windows.blocks, length, count) if options.is_causal else None
        return Layout(windows, even_chunks(around, tokens, visible, None, divisor=length + 2 * wider))

    # Rows of different length: each is padded to whole windows of its own, and cut into chunks of its own length.
    own = -(-tokens.lengths[:, None] // window) * window  # [batch, 1]
    length = own * 0 + options.chunk_size if options.chunk_size else (own // options.num_chunks).clamp_min(1)
    most = count if options.chunk_size else _most_chunks(window, options.num_chunks, padded)
    number = torch.arange(most, device=own.device)
    visible = (number < -(-own // length))[:, None, None]
    if options.is_causal:
        visible = visible & earlier_chunks(windows.blocks, length, most)
    position = (number * length)[..., None] - wider + torch.arange(longest + 2 * wider, device=own.device)
    inside = position < ((number + 1) * length + wider)[..., None]
    inside = inside & (position >= 0) & (position < tokens.lengths[:, None, None])
    index = torch.where(inside, position, -1)
    chunks = Chunks(lambda z: gather_tokens(z, index), inside, visible, count, divisor=length + 2 * wider)
    return Layout(windows, chunks)


def earlier_chunks(windows: Blocks, length: Tensor, count: int) -> Tensor:
    """`[batch or 1, windows, queries, chunks]`: chunks before the query's own; `length` `[batch or 1, 1]`."""
    device = length.device
    own = torch.arange(windows.num_blocks * windows.size, device=device) // length
    earlier = torch.arange(count, device=device) < own.unsqueeze(-1)
    return earlier.unflatten(1, (windows.num_blocks, windows.size))


def _most_chunks(window: int, num_chunks: int, padded: int) -> int:
    """The largest number of chunks that any row of at most `padded` tokens has."""
    lengths = range(window, min(padded, num_chunks**2) + 1, window)
    # Rows of more than num_chunks ** 2 tokens have at most one more than num_chunks.
    return max([num_chunks + 1 if padded > num_chunks**2 else 1, *(-(-n // max(1, n // num_chunks)) for n in lengths)])
