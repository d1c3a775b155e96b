"""EVA's estimate: every window's exact keys and the chunks that it reads, under one softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.attention_state import AttentionState, merge_states
from ...kernels.window_chunks import window_chunk_attention
from ..exact import causal_visibility, exact_partial
from ..slots import mask_logits, softmax_with_lse
from ..tokens import Tokens
from .bounded import EarlierChunks, latest_chunks
from .chunks import Summaries, Summariser
from .exclusive import exclusive_layout
from .layout import ChunkOptions, Chunks, Layout, integer_root
from .published import published_layout


def eva_estimate(
    tokens: Tokens,
    cutting: ChunkOptions,
    summarise: Summariser,
    *,
    noise: Tensor | bool = False,
    window_bias: Tensor | None = None,
    dropout: float = 0.0,
    past: EarlierChunks | None = None,
) -> AttentionState:
    """What all queries read of all tokens.

    Args:
        noise, window_bias: As in `eva_attention`.
        dropout: Its `slot_dropout`.
        past: Chunks of earlier tokens, which end where a window begins. Every query reads them, in the causal form.
    Returns: output `[batch, heads, tokens, head_dim]` and its log mass.
    """
    is_causal = cutting.is_causal
    layout = (published_layout if cutting.chunking == "published" else exclusive_layout)(cutting, tokens)
    blocks = layout.windows.blocks
    block_x = blocks.split(tokens.x)
    bias = None
    if window_bias is not None:
        wide = torch.promote_types(tokens.y.dtype, torch.float32)
        bias = _fit_bias(window_bias, cutting, layout, tokens.y.shape[1]).to(wide)
    chunks, pieces = layout.chunks, None
    if chunks is None:
        partial = _windows(tokens, block_x, layout, is_causal, bias)
    else:
        summaries = summarise(tokens.x, tokens.y, tokens.value, chunks, noise)
        if chunks.partly_seen_windows is not None:
            # Summarised first, so that the backward pass starts with what needs most memory.
            member = blocks.real(tokens.valid, tokens.y.device)
            windows = Chunks(blocks.split, member, None, blocks.num_blocks)
            pieces = summarise(tokens.x, tokens.y, tokens.value, windows, noise is True).select(
                chunks.partly_seen_windows
            )
        few = None if cutting.max_chunks is None else _latest(cutting, layout, summaries, past)
        if few is not None:
            partial = few.join(_windows(tokens, block_x, layout, is_causal, bias), block_x, dropout=dropout)
            past = None  # among the few
        elif chunks.hidden is not None and bias is None and not dropout and summaries.spread is None:
            partial = _window_chunks(tokens, block_x, layout, is_causal, summaries, *chunks.hidden)
        else:
            far = summaries.read(block_x, chunks.seen(), dropout=dropout)
            partial = merge_states([far, _windows(tokens, block_x, layout, is_causal, bias)])
    if pieces is not None:
        partial = pieces.join(partial, block_x, dropout=dropout)
    if past is not None and past.latest.value.shape[2]:
        partial = past.together().join(partial, block_x, dropout=dropout)
    return AttentionState(blocks.join(partial.output), blocks.join(partial.lse.unsqueeze(-1)).squeeze(-1))


def _latest(
    cutting: ChunkOptions, layout: Layout, summaries: Summaries, past: EarlierChunks | None
) -> Summaries | None:
    """The few chunks that every window reads, with `max_chunks`; `None` if it reads all of them singly."""
    around, window = layout.windows, cutting.window_size
    assert cutting.max_chunks is not None
    assert cutting.chunk_size is not None
    per_window, skipped = window // cutting.chunk_size, around.left // window
    return latest_chunks(summaries, cutting.max_chunks, around.blocks.num_blocks, per_window, skipped, past)


def _seen(tokens: Tokens, layout: Layout) -> Tensor | None:
    """`[batch or 1, 1, windows, 1, slots]`: places of windows that hold a key to see; `None` if all do."""
    around = layout.windows
    slots = around.left + around.blocks.size + around.right
    whole = around.blocks.grid is None and around.blocks.num_blocks * around.blocks.size == around.blocks.tokens
    if whole and slots == around.blocks.size and tokens.valid is None and layout.reach is None:
        return None
    seen = around.real(tokens.valid, tokens.y.device)[:, None, :, None, :]
    if layout.reach is not None:
        place = torch.arange(slots, device=seen.device) - around.left
        within = (place >= -layout.reach) & (place < around.blocks.size + layout.reach)
        seen = seen & within[:, None, None, None]
    return seen


def _windows(tokens: Tokens, block_x: Tensor, layout: Layout, is_causal: bool, bias: Tensor | None) -> AttentionState:
    """Exact attention of every window's queries to the keys it sees."""
    around, seen = layout.windows, _seen(tokens, layout)
    if is_causal:
        earlier = causal_visibility(around.blocks.size, around.left + around.blocks.size, block_x.device)
        seen = earlier if seen is None else seen & earlier
    keys, values = around.split(tokens.y), around.split(tokens.value)
    if bias is None:
        return exact_partial(block_x, keys, values, seen)
    logits = block_x.to(bias.dtype) @ keys.to(bias.dtype).transpose(-1, -2) + bias
    return softmax_with_lse(mask_logits(logits, seen), values)


def _window_chunks(
    tokens: Tokens,
    block_x: Tensor,
    layout: Layout,
    is_causal: bool,
    summaries: Summaries,
    hidden_from: Tensor,
    hidden_to: Tensor,
) -> AttentionState:
    """The windows and all chunks under one softmax, if every window reads all chunks but a range."""
    lead = block_x.shape[:2]

    def grouped(x: Tensor) -> Tensor:
        return x.expand(*lead, *x.shape[2:]).flatten(0, 1)

    seen = _seen(tokens, layout)
    both = window_chunk_attention(
        grouped(block_x),
        grouped(layout.windows.split(tokens.y)),
        grouped(layout.windows.split(tokens.value)),
        None if seen is None else grouped(seen),
        is_causal,
        grouped(summaries.key_mean.to(block_x.dtype)),
        grouped(summaries.log_weight),
        grouped(summaries.value.to(block_x.dtype)),
        grouped(hidden_from[:, None]),
        grouped(hidden_to[:, None]),
    )
    return AttentionState(both.output.unflatten(0, lead), both.lse.unflatten(0, lead))


def _fit_bias(bias: Tensor, cutting: ChunkOptions, layout: Layout, heads: int) -> Tensor:
    """The part of `window_bias` that this layout's windows need, with room for batch and windows."""
    around, full = layout.windows, cutting.window_size
    size, left, right = around.blocks.size, around.left, around.right
    is_grid = around.blocks.grid is not None
    shape = f"[heads or 1, {'window_size ** 2' if is_grid else 'window_size'}, slots]"
    if bias.ndim not in (3, 5) or (bias.ndim == 3 and bias.shape[0] not in (1, heads)):
        raise InputError(
            f"window_bias must be {shape}, or with 5 dimensions; got {tuple(bias.shape)} and {heads} heads."
        )
    side, slots = (integer_root(n) if is_grid else n for n in bias.shape[-2:])
    reach = slots - full
    if cutting.overlap_side == "both":
        reach = reach // 2 if reach % 2 == 0 else -1
    least = 0 if cutting.overlap_side is None else max(left, right)
    wrong = is_grid and (side**2, slots**2) != tuple(bias.shape[-2:])
    if wrong or side != full or reach < least or (cutting.overlap_side is None and reach):
        sides = {None: 0, "left": 1, "both": 2}[cutting.overlap_side]
        needs = f"{full} + {sides} * reach{' squared' if is_grid else ''}, reach >= {least}"
        raise InputError(
            f"window_bias must be {shape} with window_size={full} and slots = {needs}; got {tuple(bias.shape)}."
        )
    if bias.ndim == 3:
        bias = bias.unsqueeze(1)
    if (size, left, right) == (full, reach, reach if cutting.overlap_side == "both" else 0):
        return bias
    start, stop = reach - left, reach + size + right
    if not is_grid:
        return bias[..., :size, start:stop]
    bias = bias.unflatten(-1, (slots, slots)).unflatten(-3, (side, side))
    bias = bias[..., :size, :size, start:stop, start:stop]
    return bias.flatten(-2).flatten(-3, -2)
