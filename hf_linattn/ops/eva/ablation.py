"""EVA of which a part is taken away (`ops/ablation.py`): chunks are its slots."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ablation import SHUFFLED_SLOTS, SLOT_SHARE, SLOTS_ALONE, WINDOW_ALONE, current_ablations
from ..noise import RowNoise
from ..padding import Tokens
from .chunks import MakesSummaries, Summaries
from .exclusive import exclusive_layout
from .layout import ChunkOptions, Chunks, Layout
from .published import earlier_chunks


def ablated_chunks(
    tokens: Tokens, options: ChunkOptions, summarise: MakesSummaries, layout: Layout
) -> tuple[Tokens, ChunkOptions, MakesSummaries, Layout]:
    """What stands in place of tokens, options, summaries and layout.

    Of slots alone, the windows see nothing, and a query reads all chunks; if causal, those before its own chunk. Then
    `max_chunks` has no effect. Of shuffled slots, a chunk has the value of the chunk before it; the first one that of
    the last or, if causal, its own: no query learns of later tokens.
    """
    names = current_ablations()
    if WINDOW_ALONE in names:
        layout = replace(layout, chunks=None)
    if SLOTS_ALONE in names:
        layout, options = _without_windows(layout, options, tokens), replace(options, max_chunks=None)
    if SHUFFLED_SLOTS in names:
        summarise = _Shuffled(summarise, options.is_causal)
    if SLOT_SHARE in names:
        tokens, summarise = replace(tokens, value=torch.zeros_like(tokens.value)), _OfValueOne(summarise)
    return tokens, options, summarise, layout


def _without_windows(layout: Layout, options: ChunkOptions, tokens: Tokens) -> Layout:
    if layout.chunks is None:
        layout = exclusive_layout(options, tokens, always_chunks=True)
    chunks, blocks = layout.chunks, layout.windows.blocks
    assert chunks is not None
    visible = chunks.visible
    if options.chunking == "exclusive":
        visible = None
        if options.is_causal:
            length = torch.full((1, 1), options.chunk_size or 1, device=tokens.key.device)
            visible = earlier_chunks(blocks, length, chunks.member.shape[1])
    chunks = replace(chunks, visible=visible, unread_range=None, partly_seen_windows=None)
    nothing = torch.full((1, 1), -blocks.size, device=tokens.key.device)
    return Layout(layout.windows, chunks, nothing)


@dataclass(frozen=True)
class _Summariser:
    """Summaries made of others."""

    summarise: MakesSummaries

    @property
    def uses_queries(self) -> bool:
        return self.summarise.uses_queries

    @property
    def has_spread(self) -> bool:
        return self.summarise.has_spread


@dataclass(frozen=True)
class _Shuffled(_Summariser):
    is_causal: bool

    def __call__(
        self, query: Tensor | None, key: Tensor, value: Tensor, chunks: Chunks, noise: Tensor | RowNoise | bool = False
    ) -> Summaries:
        summaries = self.summarise(query, key, value, chunks, noise)
        before = torch.arange(-1, chunks.member.shape[1] - 1, device=key.device).expand(len(chunks.member), -1)
        last = torch.zeros_like(before) if self.is_causal else (chunks.member.any(-1).sum(-1, keepdim=True) - 1)
        before = torch.where(before < 0, last.clamp_min(0), before)[:, None, :, None]
        return replace(summaries, value=summaries.value.gather(2, before.expand_as(summaries.value)))


@dataclass(frozen=True)
class _OfValueOne(_Summariser):
    def __call__(
        self, query: Tensor | None, key: Tensor, value: Tensor, chunks: Chunks, noise: Tensor | RowNoise | bool = False
    ) -> Summaries:
        summaries = self.summarise(query, key, value, chunks, noise)
        return replace(summaries, value=torch.ones_like(summaries.value))
