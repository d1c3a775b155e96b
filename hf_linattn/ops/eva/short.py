"""EVA on short inputs, on a CPU: the same function in one operator (`kernels/short_chunks`)."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from ...kernels.backends import current_backend, runs_on_triton
from ...kernels.operators import is_plain
from ...kernels.short_chunks import short_pooled, short_variates
from ...kernels.short_chunks.cutting import Sizes
from ..ablation import ABLATED
from ..exact import exact_softmax
from ..inputs import check_grid
from ..padding import real_tokens_first
from ..proposal_map import ResidualMap
from .chunks import MakesSummaries, Summariser
from .exclusive import longest_chunk
from .layout import ChunkOptions, integer_root
from .learned_summaries import LearnedSummariser

# Most tokens of a short input. In longer ones, all chunks beside those of every window cost more than they save.
LONGEST = 2048

_longest_chunk = functools.lru_cache(maxsize=1024)(longest_chunk)


def short_eva(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: ChunkOptions,
    summarise: MakesSummaries,
    scaling: float,
    *,
    key_mask: Tensor | None = None,
    real_first: bool = False,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
) -> Tensor | None:
    """What all queries read of all tokens, `[batch, heads, tokens, head_dim]`.

    Args: key_mask, real_first, grid, num_global_tokens: As in `eva_attention`.
    Returns: `None` for what is not short, or not on a CPU, or with options that this road does not know.
    """
    tokens, window = key.shape[2] - num_global_tokens, options.window_size
    if (
        not window < (tokens if grid is None else max(grid))
        or tokens > LONGEST
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
    if key_mask is not None and (num_global_tokens or not is_plain((query, key, value, key_mask))):
        return None
    height = width = 0
    if grid is not None:
        check_grid(tokens, grid, key_mask)
        (height, width), key_mask = grid, None
        chunk = options.chunk_size or _longest_chunk(window, max(1, integer_root(options.num_chunks)), max(grid))
    else:
        chunk = options.chunk_size or _longest_chunk(window, options.num_chunks, tokens)
    parameters = _parameters(summarise, chunk, key.dtype)
    if parameters is None:
        return None
    if chunk == 1 and parameters == [None, None]:  # every key for itself
        return exact_softmax(query, key, value, key_mask, scaling=scaling, real_first=real_first)
    lengths: tuple[int, ...] = ()
    moved = None
    if key_mask is not None:
        lengths = tuple(key_mask.sum(-1).tolist())
        if not real_first:
            query, key, value, moved = _real_first(query, key, value, key_mask, lengths)
        if min(lengths) == tokens:
            lengths = ()
    chunks: tuple[int, ...] = ()
    if lengths:
        chunks = tuple([options.chunk_size or _longest_chunk(window, options.num_chunks, n) for n in lengths])
    weighs_size = not isinstance(summarise, Summariser) or summarise.weighting == "size"
    sizes = Sizes(window, chunk, weighs_size, scaling, height, width, num_global_tokens, lengths, chunks)
    if isinstance(summarise, Summariser):
        output = short_variates(query, key, value, parameters[0], parameters[1], summarise.proposals, sizes).output
    else:
        output = short_pooled(query, key, value, cast(list[Tensor], parameters), sizes).output
    if key_mask is None or real_first:
        return output
    if moved is not None:
        output = output.gather(2, moved.argsort(dim=-1)[:, None, :, None].expand_as(output))
    return output.masked_fill(~key_mask[:, None, :, None], 0.0)


def _parameters(summarise: MakesSummaries, chunk: int, dtype: torch.dtype) -> list[Tensor | None] | None:
    """Tensors of the kernel beside the tokens; `None` where it knows no such summaries."""
    if isinstance(summarise, LearnedSummariser):
        return [z.to(dtype) for z in vars(summarise).values()]
    if not isinstance(summarise, Summariser) or summarise.weighting == "spread":
        return None
    # One token is its chunk's value, whatever the proposal.
    query_map = summarise.query_map if summarise.proposals in ("sum", "mean") and chunk > 1 else None
    found: list[Tensor | None] = []
    for each in (query_map, summarise.key_map):
        if each is not None and not isinstance(each, ResidualMap):
            return None
        found.append(None if each is None else each.adapter.to(dtype))
    return found


def _real_first(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same with the real tokens of a row first and zeros behind, and the order of the tokens if it is another."""
    tokens = mask.shape[1]
    if min(lengths) == tokens:
        return query, key, value, None
    order, valid = None, mask
    if not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        order, valid = real_tokens_first(mask)
    padding = ~valid[:, None, :, None]
    moved = []
    for x in (query, key, value):
        if order is not None:
            x = x.gather(2, order[:, None, :, None].expand_as(x))
        moved.append(x.masked_fill(padding, 0.0))
    return moved[0], moved[1], moved[2], order
