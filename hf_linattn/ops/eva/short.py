"""EVA on short inputs, on a CPU: the same function in one operator (`kernels/short_chunks`)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.backends import current_backend, runs_on_triton
from ...kernels.short_chunks import short_pooled, short_variates
from ...kernels.short_chunks.cutting import Sizes
from ..ablation import ABLATED
from ..proposal_map import ResidualMap
from .chunks import MakesSummaries, Summariser
from .exclusive import longest_chunk
from .layout import ChunkOptions
from .learned_summaries import LearnedSummariser

# Most tokens of a short input. In longer ones, keys and values of all chunks beside those of every window cost more
# than they save.
LONGEST = 2048

_longest_chunk = functools.lru_cache(maxsize=256)(longest_chunk)


def short_eva(
    query: Tensor, key: Tensor, value: Tensor, options: ChunkOptions, summarise: MakesSummaries, scaling: float
) -> Tensor | None:
    """What all queries read of all tokens, `[batch, heads, tokens, head_dim]`, of an input without padding.

    Returns: `None` for what is not short, or not on a CPU, or with options that this road does not know.
    """
    tokens, window = key.shape[2], options.window_size
    if (
        not window < tokens <= LONGEST
        or not query.numel()
        or options.is_causal
        or options.overlap_side is not None
        or options.chunking != "exclusive"
        or query.device.type != "cpu"
        or query.shape != key.shape
        or key.shape != value.shape
        or ABLATED
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or runs_on_triton(current_backend(), query)
    ):
        return None
    chunk = options.chunk_size or _longest_chunk(window, options.num_chunks, tokens)
    adapters: list[Tensor | None] = [None, None]
    if isinstance(summarise, Summariser):
        if summarise.weighting == "spread":
            return None
        if chunk == 1 and summarise.key_map is None:  # every key for itself
            return F.scaled_dot_product_attention(query, key, value, scale=scaling)
        # One token is its chunk's value, whatever the proposal.
        query_map = summarise.query_map if summarise.proposals in ("sum", "mean") and chunk > 1 else None
        for place, each in enumerate((query_map, summarise.key_map)):
            if isinstance(each, ResidualMap):
                adapters[place] = each.adapter.to(key.dtype).unsqueeze(0)
            elif each is not None:
                return None
    elif not isinstance(summarise, LearnedSummariser):
        return None
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    missing = -tokens % max(window, chunk)
    if missing:
        query, key, value = [F.pad(z, (0, 0, 0, 0, 0, missing)) for z in (query, key, value)]
    if isinstance(summarise, Summariser):
        sizes = Sizes(tokens, window, chunk, summarise.weighting == "size", scaling)
        output = short_variates(query, key, value, adapters[0], adapters[1], summarise.proposals, sizes).output
    else:
        maps = [z.to(key.dtype).unsqueeze(0) for z in vars(summarise).values()]
        output = short_pooled(query, key, value, maps, Sizes(tokens, window, chunk, True, scaling)).output
    return (output[:, :tokens] if missing else output).transpose(1, 2)
