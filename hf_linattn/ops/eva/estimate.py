"""EVA's estimate: every window's exact keys and the chunks that it reads, under one softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.attend import attend
from ...kernels.attention_state import AttentionState, merge_states
from ...kernels.window_chunks import window_chunk_attention
from ..ablation import ABLATED
from ..layout import WindowedBlocks
from ..noise import Dropped, RowNoise, SlotDropout, dropped_slots, with_noise
from ..padding import Tokens
from ..softmax import causal_visibility, mask_logits, softmax_with_lse
from .ablation import ablated_chunks
from .bounded import EarlierChunks, latest_chunks, member_numbers
from .chunks import MakesSummaries, Summaries
from .exclusive import exclusive_layout
from .layout import ChunkOptions, Chunks, Layout, integer_root, outside
from .published import published_layout

T = TypeVar("T")

# Sorts of what stands for keys, each with numbers of its own for dropout.
CHUNK, WINDOW, PAST = 0, 1, 2


def eva_estimate(
    tokens: Tokens,
    options: ChunkOptions,
    summarise: MakesSummaries,
    *,
    noise: Tensor | RowNoise | bool = False,
    window_bias: Tensor | None = None,
    dropout: float | SlotDropout = 0.0,
    past: EarlierChunks | None = None,
) -> AttentionState:
    """What all queries read of all tokens.

    Args:
        noise, window_bias: As in `eva_attention`.
        dropout: Its `slot_dropout`.
        past: Chunks of earlier tokens, which end where a window begins. Every query reads them, in the causal form.
    Returns: output `[batch, heads, tokens, head_dim]` and its log-sum-exp.
    """
    is_causal = options.is_causal
    layout = (published_layout if options.chunking == "published" else exclusive_layout)(options, tokens)
    if ABLATED:
        tokens, options, summarise, layout = ablated_chunks(tokens, options, summarise, layout)
    blocks = layout.windows.blocks
    block_query = blocks.split(tokens.query)
    bias = fit_bias(window_bias, options, layout, tokens.key)
    drop = with_noise(dropout, tokens.query) if dropout else None

    def dropped(member: Tensor, sort: int) -> Dropped | None:
        place = torch.arange(tokens.query.shape[2], device=member.device)
        return dropped_members(drop, block_query, blocks.split(place[:, None]), member, sort)

    chunks, unseen_windows = layout.chunks, None
    partly_seen = None if chunks is None else chunks.partly_seen_windows
    if chunks is None:
        state = _windows(tokens, block_query, layout, is_causal, bias)
    else:
        summaries = summarise(tokens.query, tokens.key, tokens.value, chunks, noise)
        if partly_seen is not None:
            member = WindowedBlocks(blocks).real(tokens.valid, tokens.key.device)
            # Summarised first, so that the backward pass starts with what needs most memory.
            windows = Chunks(blocks.split, member, None, blocks.num_blocks)
            own_noise = noise.apart() if isinstance(noise, RowNoise) else noise is True
            unseen_windows = summarise(tokens.query, tokens.key, tokens.value, windows, own_noise)
            unseen_windows = unseen_windows.select(partly_seen)
        latest_summaries = None
        if options.max_chunks is not None:
            latest_summaries = _per_window(latest_chunks, options, layout, summaries=summaries, past=past)
        if latest_summaries is not None:
            state = _windows(tokens, block_query, layout, is_causal, bias)
            without = None
            if drop is not None:
                numbers = _per_window(member_numbers, options, layout, device=block_query.device)
                without = dropped(numbers[None], CHUNK)
            state = latest_summaries.join(state, block_query, dropped=without)
            past = None  # among the latest
        elif chunks.unread_range is not None:
            without = None if drop is None else dropped(chunk_numbers(summaries), CHUNK)
            unread = chunks.unread_range
            state = windows_and_chunks(
                tokens, block_query, layout, summaries, unread, is_causal=is_causal, bias=bias, dropped=without
            )
        else:
            without = None if drop is None else dropped(chunk_numbers(summaries), CHUNK)
            far = summaries.read(block_query, chunks.visible, dropped=without)
            state = merge_states([far, _windows(tokens, block_query, layout, is_causal, bias)])
    if unseen_windows is not None and partly_seen is not None:
        without = None if drop is None else dropped(partly_seen, WINDOW)
        state = unseen_windows.join(state, block_query, dropped=without)
    if past is not None and past.latest.value.shape[2]:
        earlier = past.together()
        without = None if drop is None else dropped(chunk_numbers(earlier), PAST)
        state = earlier.join(state, block_query, dropped=without)
    return AttentionState(blocks.join(state.output), blocks.join(state.lse.unsqueeze(-1)).squeeze(-1))


def dropped_members(
    drop: SlotDropout | None, block_query: Tensor, place: Tensor, member: Tensor, sort: int
) -> Dropped | None:
    """What queries do without.

    Args:
        place: `[windows, queries, 1]`, of the queries in their row.
        member: `[batch or 1, windows or 1, members]`, numbers of what stands for keys, by `sort`; negative for none.
    """
    return dropped_slots(drop, block_query, place[None, None], member.clamp_min(0)[:, None, :, None], sort)


def chunk_numbers(summaries: Summaries) -> Tensor:
    """`[1, 1, chunks]`: numbers of chunks, from 1 on."""
    return torch.arange(1, summaries.value.shape[2] + 1, device=summaries.value.device)[None, None]


def _per_window(function: Callable[..., T], options: ChunkOptions, layout: Layout, **given: Any) -> T:
    """What a function of `bounded.py` says of the few chunks that every window reads, with `max_chunks`."""
    around, window = layout.windows, options.window_size
    assert options.max_chunks is not None
    assert options.chunk_size is not None
    return function(
        max_chunks=options.max_chunks,
        num_windows=around.blocks.num_blocks,
        per_window=window // options.chunk_size,
        skipped=around.left // window,
        **given,
    )


def _seen(tokens: Tokens, layout: Layout) -> Tensor | None:
    """`[batch or 1, 1, windows, 1, places]`: places of windows that hold a key to see; `None` if all do."""
    around, blocks = layout.windows, layout.windows.blocks
    reaches = around.left or around.right
    if not reaches and blocks.is_whole and blocks.grid is None and tokens.valid is None and layout.reach is None:
        return None
    seen = around.real(tokens.valid, tokens.key.device)[:, None, :, None, :]
    if layout.reach is not None:
        place = torch.arange(seen.shape[-1], device=seen.device) - around.left
        within = (place >= -layout.reach) & (place < blocks.size + layout.reach)
        seen = seen & within[:, None, None, None]
    return seen


def _windows(
    tokens: Tokens, block_query: Tensor, layout: Layout, is_causal: bool, bias: Tensor | None
) -> AttentionState:
    """Exact attention of every window's queries to the keys it sees."""
    around, seen = layout.windows, _seen(tokens, layout)
    if is_causal:
        earlier = causal_visibility(around.blocks.size, around.left + around.blocks.size, block_query.device)
        seen = earlier if seen is None else seen & earlier
    key, value = around.split(tokens.key), around.split(tokens.value)
    if bias is None:
        return attend(block_query, key, value, visible=seen)
    logits = block_query.to(bias.dtype) @ key.to(bias.dtype).transpose(-1, -2) + bias
    return softmax_with_lse(mask_logits(logits, seen), value)


def windows_and_chunks(
    tokens: Tokens,
    block_query: Tensor,
    layout: Layout,
    summaries: Summaries,
    unread_range: tuple[Tensor, Tensor],
    *,
    is_causal: bool = False,
    bias: Tensor | None = None,
    dropped: Dropped | None = None,
) -> AttentionState:
    """The windows and all chunks under one softmax, if every window reads all chunks but a range.

    Args:
        block_query: Scaled queries, `[batch, heads, windows, queries, head_dim]`.
        layout: Its windows, and how far they reach.
        unread_range: As in `Chunks`. bias: From `fit_bias`. dropped: Chunks that queries do without.
    """
    if bias is None and dropped is None and summaries.spread is None:
        return _window_chunks(tokens, block_query, layout, is_causal, summaries, unread_range)
    far = summaries.read(block_query, outside(unread_range, summaries.value.shape[2]), dropped=dropped)
    return merge_states([far, _windows(tokens, block_query, layout, is_causal, bias)])


def _window_chunks(
    tokens: Tokens,
    block_query: Tensor,
    layout: Layout,
    is_causal: bool,
    summaries: Summaries,
    unread_range: tuple[Tensor, Tensor],
) -> AttentionState:
    """`windows_and_chunks` in one operation."""
    lead = block_query.shape[:2]

    def grouped(x: Tensor) -> Tensor:
        return x.expand(*lead, *x.shape[2:]).flatten(0, 1)

    seen = _seen(tokens, layout)
    both = window_chunk_attention(
        block_query.flatten(0, 1),
        layout.windows.split(tokens.key).flatten(0, 1),
        layout.windows.split(tokens.value).flatten(0, 1),
        None if seen is None else grouped(seen),
        is_causal,
        summaries.key_mean.to(block_query.dtype).flatten(0, 1),
        summaries.log_weight.flatten(0, 1),
        summaries.value.to(block_query.dtype).flatten(0, 1),
        grouped(unread_range[0][:, None]),
        grouped(unread_range[1][:, None]),
    )
    return AttentionState(both.output.unflatten(0, lead), both.lse.unflatten(0, lead))


def fit_bias(bias: Tensor | None, options: ChunkOptions, layout: Layout, key: Tensor) -> Tensor | None:
    """The part of `window_bias` that this layout's windows need, with room for batch and windows, in a dtype for
    logits with such keys `[batch, heads, tokens, head_dim]`."""
    if bias is None:
        return None
    heads, bias = key.shape[1], bias.to(torch.promote_types(key.dtype, torch.float32))
    around, full = layout.windows, options.window_size
    size, left, right = around.blocks.size, around.left, around.right
    is_grid = around.blocks.grid is not None
    shape = f"[heads or 1, {'window_size ** 2' if is_grid else 'window_size'}, slots]"
    if bias.ndim not in (3, 5) or (bias.ndim == 3 and bias.shape[0] not in (1, heads)):
        raise InputError(
            f"window_bias must be {shape}, or with 5 dimensions; got {tuple(bias.shape)} and {heads} heads."
        )
    side, slots = (integer_root(n) if is_grid else n for n in bias.shape[-2:])
    reach = slots - full
    if options.overlap_side == "both":
        reach = reach // 2 if reach % 2 == 0 else -1
    least = 0 if options.overlap_side is None else max(left, right)
    wrong = is_grid and (side**2, slots**2) != tuple(bias.shape[-2:])
    if wrong or side != full or reach < least or (options.overlap_side is None and reach):
        sides = {None: 0, "left": 1, "both": 2}[options.overlap_side]
        needs = f"{full} + {sides} * reach{' squared' if is_grid else ''}, reach >= {least}"
        raise InputError(
            f"window_bias must be {shape} with window_size={full} and slots = {needs}; got {tuple(bias.shape)}."
        )
    if bias.ndim == 3:
        bias = bias.unsqueeze(1)
    if (size, left, right) == (full, reach, reach if options.overlap_side == "both" else 0):
        return bias
    start, stop = reach - left, reach + size + right
    if not is_grid:
        return bias[..., :size, start:stop]
    bias = bias.unflatten(-1, (slots, slots)).unflatten(-3, (side, side))
    bias = bias[..., :size, :size, start:stop, start:stop]
    return bias.flatten(-2).flatten(-3, -2)
