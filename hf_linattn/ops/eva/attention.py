r"""EVA: exact attention in a local window, one control-variate summary per chunk elsewhere (Zheng et al. 2023,
arXiv:2302.04542).

In scaled coordinates, with `mu_c` from the means of chunk c:

    chunk value   u_c = sum_n softmax_n(mu_c . y_n - |y_n|^2 / 2) v_n      over the chunk's own keys
    chunk logit   x_t . ybar_c + log(size of c) [+ the chunk's spread]       an estimate of log sum_n exp(x_t . y_n)

and one softmax runs over the window's keys and the chunks (`chunks.py` makes these, the control variates). By default
chunks never straddle a window's border, and a query does not read the chunks that its window touches, so that every
key counts exactly once (`exclusive.py`).
"""

from __future__ import annotations

from torch import Tensor

from ...errors import InputError
from ..exact import ONE_WINDOW, in_one_window
from ..inputs import checked_attention, factor_of, prepare_tokens
from ..noise import RowNoise, SlotDropout, noise_factor
from ..proposal_map import ProposalMap
from .chunks import CHUNK_WEIGHTINGS, PROPOSALS, Summariser
from .estimate import eva_estimate
from .layout import ChunkOptions, default_chunk
from .short import short_eva


@checked_attention(in_half=("cuda",))
def eva_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window_size: int = 64,
    overlap_window: bool = False,
    overlap_side: str | None = None,
    num_chunks: int = 128,
    chunk_size: int | None = None,
    chunking: str = "exclusive",
    max_chunks: int | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    proposals: str = "sum",
    weighting: str = "size",
    query_map: ProposalMap | None = None,
    key_map: ProposalMap | None = None,
    noise: Tensor | RowNoise | bool = False,
    noise_scale: str = "corrected",
    window_bias: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    slot_dropout: float | SlotDropout = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    real_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """EVA attention.

    Source: Zheng et al. 2023, arXiv:2302.04542, section 4. Differs from it: chunks weigh by their size, a key in the
    window is not also in a visible chunk, windows and chunks are those of a row's real tokens, any length works.
    `chunking="published", weighting="none", noise_scale="published"` are the conventions of the official code
    (`HKUNLP/efficient-attention`), up to what it does with padding, and with lengths that it refuses.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`. In the causal form queries may be fewer than keys (the
            last ones), if the proposals come from the keys alone.
        window_size: Tokens of a window (side of a square with a `grid`), at least 1.
        overlap_window: The window reaches beyond its block. "exclusive": by half a window on each side, rounded up to
            whole chunks, or by a whole one if chunks are longer. "published": by `max(1, window_size // 2)`, and so do
            the chunks.
        overlap_side: "both", or "left": by a whole window to the left only, and chunks do not grow. `None` is "left"
            if causal, otherwise "both".
        num_chunks: "exclusive": upper bound of the number of chunks (bidirectional). Chunk lengths divide the window
            or are multiples of it; of a chunk that is longer than a window and only partly seen, the other windows are
            summaries of their own. "published": chunks have `tokens // num_chunks` tokens, of the length padded to
            whole windows.
        chunk_size: Tokens of a chunk (side of a square with a `grid`) instead: a divisor of `window_size` or, in the
            bidirectional form, a multiple. The causal form needs one, so that a prefix never changes, and takes the
            largest up to 16 if `None`; only with "published" may it do with `num_chunks`, and then the chunks
            depend on the length, and tokens of the query's own chunk before its window are not seen.
        chunking: "exclusive": every key counts once. "published": every query reads every chunk (causal: every chunk
            before its own), also those its window covers; means divide by the number of places in a chunk, also
            empty ones at the ends; a chunk of padding up to a whole window has a logit and the value 0.
        max_chunks: Causal form, "exclusive": a query reads this many chunks singly, at least 1, the latest of those it
            may read, and one summary of all earlier ones (`bounded.py`). `None`: all of them singly.
        key_mask: `[batch, tokens]` bool, True where a token is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        is_causal: No query sees a later key: chunks are visible once the window they lie in has passed.
        proposals: "sum" (mean query + mean key), "mean" (half of it), "key" (mean key) or "none" (0).
        weighting: "none" (all chunks weigh the same), "size", or "spread", which adds half the variance of the chunk's
            keys along the query (diagonal).
        query_map, key_map: Applied to the mean query and key of a chunk (not scaled), `[batch, heads, chunks,
            head_dim]`. The mapped mean key is also the one in the chunk's logit.
        noise: Standard normal, `[batch, heads, chunks, head_dim]`, added to the proposals; or True to draw it, or a
            `RowNoise` to take it from. At least as many chunks as a row of full length has; a shorter row that has
            more gets none for those.
        noise_scale: "corrected", noise in the coordinates of the densities, `sqrt(scaling) * key`; or "published", in
            those of `key`.
        window_bias: Added to the logits of the window. `[heads or 1, window_size, slots]`, or with dimensions for
            batch and windows `[.., .., .., window_size, slots]`; entry `(a, j)` is for the query at place `a` of the
            window and the key at place `j - reach`, with as many slots before the window as after it (overlap to the
            left: before it only). `reach` may be larger than what is seen; `window_size` is always large enough. With
            a grid both are flattened squares. Short inputs take the part that they need.
        grid, num_global_tokens, slot_dropout: As in `favor_attention`.
        cu_seqlens, max_seqlen, real_first, backend: As in `favor_attention`.
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`; zeros for padded queries.
    Raises: InputError if shapes or options do not fit; UnsupportedError for options that exclude each other.
    Cost: O(tokens * (window_size + num_chunks) * head_dim); causal O(tokens * (window_size + tokens / chunk_size) *
        head_dim), with `max_chunks` instead of `tokens / chunk_size` if given. Random: only through `noise` and
        `slot_dropout`.
    """
    if is_causal and chunk_size is None and chunking == "exclusive":
        chunk_size = default_chunk(window_size)
    if overlap_side is not None and not overlap_window:
        raise InputError(f"overlap_side={overlap_side!r} needs overlap_window=True.")
    side = (overlap_side or ("left" if is_causal else "both")) if overlap_window else None
    chunk_options = ChunkOptions(window_size, num_chunks, chunk_size, chunking, side, is_causal, max_chunks)
    chunk_options.check(grid)
    if is_causal and proposals in ("sum", "mean") and query.shape[2] != key.shape[2]:
        raise InputError(
            f"Causal EVA with proposals={proposals!r} needs the queries of all tokens; got {query.shape[2]} queries"
            f" and {key.shape[2]} keys. Use proposals='key' with a cache of keys, convert the model with a"
            " chunk_size (it then keeps a state), or recompute without a cache (use_cache=False)."
        )
    scaling = factor_of(query, scaling)
    factor = noise_factor(noise_scale, scaling)
    summarise = Summariser(proposals, weighting, query_map, key_map, scaling**0.5, factor)
    if proposals not in PROPOSALS or weighting not in CHUNK_WEIGHTINGS:
        summarise.check()
    if window_bias is None and in_one_window(query, key, key_mask, **chunk_options.window(num_global_tokens, grid)):
        return ONE_WINDOW
    if window_bias is None and noise is False and not slot_dropout:
        output = short_eva(
            query,
            key,
            value,
            chunk_options,
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
    return tokens.finish(
        eva_estimate(tokens, chunk_options, summarise, noise=noise, window_bias=window_bias, dropout=slot_dropout)
    )
