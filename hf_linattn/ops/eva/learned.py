r"""EVA with learned summaries: each chunk is one key and one value, pooled with weights that are trained.

Per head, with pooling weights `u` and `w`, residual maps `A` and `B`, an offset `g_0` and slopes `g` and `m` of the
mass of the chunks, for scaled queries `x` and keys `y`:

    chunk key     ybar_c = (I + A)^T sum_n softmax_n(u . y_n) y_n     over the C tokens of the chunk
    chunk value   u_c = sum_n softmax_n(w . y_n) v_n
    chunk logit   ((I + B)^T x_t) . ybar_c + log C + g_0 + g . x_t + m . ybar_c

and one softmax runs over the window's keys and the chunks. With all of them zero a chunk is its mean key and its mean
value, with the mass of its tokens. The logit is linear in `x_t`, so for the kernels a chunk has the key
`(I + B) ybar_c + g`, and the rest is its log-weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..exact import ONE_WINDOW, in_one_window
from ..inputs import checked_attention, factor_of, prepare_tokens
from ..learned import matching_offset
from ..noise import SlotDropout
from .estimate import eva_estimate
from .layout import ChunkOptions, default_chunk
from .learned_summaries import LearnedSummariser
from .recurrent import EvaRecurrence, recurrent_options
from .short import short_eva


@checked_attention(in_half=("cuda",))
def learned_eva_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summarise: LearnedSummariser,
    *,
    window_size: int = 64,
    overlap_window: bool = False,
    num_chunks: int = 128,
    chunk_size: int | None = None,
    max_chunks: int | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    window_bias: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    slot_dropout: float | SlotDropout = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    real_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """EVA with learned summaries.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`. In the causal form queries may be fewer than keys.
        summarise: Of this number of heads and this head_dim.
        max_chunks: As in `eva_attention`; the earlier chunks are merged with the weights `C exp(g_0 + m . ybar_c)`.
        The others as in `eva_attention`, with its chunking "exclusive".
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`; zeros for padded queries.
    Raises: InputError and UnsupportedError as `eva_attention` does.
    Cost: As `eva_attention`.
    """
    options = _chunk_options(window_size, overlap_window, num_chunks, chunk_size, max_chunks, is_causal)
    options.check(grid)
    scaling = factor_of(query, scaling)
    if window_bias is None and in_one_window(query, key, key_mask, **options.window(num_global_tokens, grid)):
        return ONE_WINDOW
    if window_bias is None and not slot_dropout:
        output = short_eva(
            query,
            key,
            value,
            options,
            summarise,
            scaling,
            key_mask=key_mask,
            real_first=real_first,
            grid=grid,
            num_global_tokens=num_global_tokens,
        )
        if output is not None:
            return output
    tokens = prepare_tokens(
        query, key, value, key_mask, scaling, is_causal, num_global_tokens, grid, real_first=real_first
    )
    if tokens.key.shape[2] == 0:
        return tokens.finish(None)
    tokens = tokens.packed()
    return tokens.finish(eva_estimate(tokens, options, summarise, window_bias=window_bias, dropout=slot_dropout))


def _chunk_options(
    window_size: int,
    overlap_window: bool,
    num_chunks: int,
    chunk_size: int | None,
    max_chunks: int | None,
    is_causal: bool,
) -> ChunkOptions:
    if is_causal and chunk_size is None:
        chunk_size = default_chunk(window_size)
    side = ("left" if is_causal else "both") if overlap_window else None
    return ChunkOptions(window_size, num_chunks, chunk_size, "exclusive", side, is_causal, max_chunks)


@torch.no_grad()
def eva_learning_start(
    query: Tensor,
    key: Tensor,
    summarise: LearnedSummariser,
    *,
    window_size: int = 64,
    overlap_window: bool = False,
    num_chunks: int = 128,
    chunk_size: int | None = None,
    max_chunks: int | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    mean: Callable[[Tensor, Tensor], Tensor] = torch.div,
) -> dict[str, Tensor]:
    """Where training starts, in closed form: `far_offset`.

    With it the mean log-mass of the chunks, over queries, is that of the keys that they stand for.

    Args:
        query, key: `[batch, heads, tokens, head_dim]`. The others as in `learned_eva_attention`.
        mean: From a sum over these tokens and their number to the mean over the tokens of all processes.
    Cost: O(tokens^2) time and memory: for a batch of a few sequences.
    """
    query, key = query.float(), key.float()
    options = _chunk_options(window_size, overlap_window, num_chunks, chunk_size, max_chunks, is_causal)
    options.check(grid)
    tokens = prepare_tokens(query, key, key, key_mask, factor_of(query, scaling), is_causal, num_global_tokens, grid)
    none = torch.zeros_like(summarise.far_offset, dtype=torch.float32)

    def mass(offset: float) -> Tensor:
        return eva_estimate(tokens, options, replace(summarise, far_offset=none + offset)).lse

    return {"far_offset": matching_offset(tokens, mass, is_causal=is_causal, mean=mean)}


def learned_eva_recurrence(
    summarise: LearnedSummariser,
    *,
    window_size: int,
    chunk_size: int,
    overlap_window: bool = False,
    max_chunks: int | None = None,
    window_bias: Tensor | None = None,
    scaling: float,
    slot_dropout: float | SlotDropout = 0.0,
) -> EvaRecurrence:
    """The recurrent form of `learned_eva_attention(..., is_causal=True)` with the same options."""
    options = recurrent_options(window_size, chunk_size, overlap_window, "exclusive", max_chunks, window_bias)
    return EvaRecurrence(options, summarise, scaling, window_bias, slot_dropout)
