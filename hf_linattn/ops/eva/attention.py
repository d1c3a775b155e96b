r"""EVA: exact attention in a local window, one control-variate summary per chunk elsewhere (Zheng et al. 2023,
arXiv:2302.04542).

In scaled coordinates, with `mu_c` from the means of chunk c:

    chunk value   u_c = sum_n softmax_n(mu_c . y_n - |y_n|^2 / 2) v_n      over the chunk's own keys
    chunk logit   x_t . ybar_c + log(size of c) [+ the chunk's spread]       an estimate of log sum_n exp(x_t . y_n)

and one softmax runs over the window's keys and the chunks. By default chunks never straddle a window's border, and a
query does not read the chunks that its window touches, so that every key counts exactly once (`eva_exclusive.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..exact import attention_function, causal_visibility, exact_partial, scale_inputs
from ..kernels.windows_chunks import windows_chunks
from ..partial import Partial, merge
from ..slots import mask_logits, weigh
from ..tokens import Tokens, prepare
from .bounded import latest_chunks
from .chunks import MeanMap, Summaries, Summariser
from .exclusive import exclusive_layout
from .layout import Chunks, Cutting, Layout, default_chunk, integer_root
from .published import published_layout


@attention_function(in_half=("cuda",))
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
    query_map: MeanMap | None = None,
    key_map: MeanMap | None = None,
    noise: Tensor | bool = False,
    noise_scale: str = "corrected",
    window_bias: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    slot_dropout: float = 0.0,
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
        noise: Standard normal, `[batch, heads, chunks, head_dim]`, added to the proposals, or True to draw it. At
            least as many chunks as a row of full length has; a shorter row that has more gets none for those.
        noise_scale: "corrected", noise in the coordinates of the densities, `sqrt(scaling) * key`; or "published", in
            those of `key`.
        window_bias: Added to the logits of the window. `[heads or 1, window_size, slots]`, or with dimensions for
            batch and windows `[.., .., .., window_size, slots]`; entry `(a, j)` is for the query at place `a` of the
            window and the key at place `j - reach`, with as many slots before the window as after it (overlap to the
            left: before it only). `reach` may be larger than what is seen; `window_size` is always large enough. With
            a grid both are flattened squares. Short inputs take the part that they need.
        grid, num_global_tokens, slot_dropout: As in `favor_attention`.
        backend: As in `favor_attention`.
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
    cutting = Cutting(window_size, num_chunks, chunk_size, chunking, side, is_causal, max_chunks)
    cutting.check(grid)
    if is_causal and proposals in ("sum", "mean") and query.shape[2] != key.shape[2]:
        raise InputError(
            f"Causal EVA with proposals={proposals!r} needs the queries of all tokens; got {query.shape[2]} queries"
            f" and {key.shape[2]} keys. Use proposals='key' with a cache of keys, or recompute without a cache"
            " (use_cache=False)."
        )
    x, y = scale_inputs(query, key, scaling)
    root = (query.shape[-1] ** -0.5 if scaling is None else scaling) ** 0.5
    summarise = Summariser(proposals, weighting, query_map, key_map, noise_scale, root)
    summarise.check()
    tokens = prepare(x, y, value, key_mask, is_causal=is_causal, num_global_tokens=num_global_tokens, grid=grid)
    if tokens.y.shape[2] == 0:
        return tokens.finish(None)
    layout = (published_layout if chunking == "published" else exclusive_layout)(cutting, tokens)
    blocks = layout.windows.blocks
    block_x = blocks.split(tokens.x)
    bias = (
        None
        if window_bias is None
        else _fit_bias(window_bias, cutting, layout, y.shape[1]).to(torch.promote_types(y.dtype, torch.float32))
    )
    chunks = layout.chunks
    if chunks is None:
        partial = _windows(tokens, block_x, layout, is_causal, bias)
    else:
        summaries = summarise(tokens, chunks, noise)
        pieces = None
        if chunks.siblings is not None:
            # Summarised first, so that the backward pass starts with what needs most memory.
            member = blocks.real(tokens.valid, y.device)
            windows = Chunks(blocks.split, member, None, blocks.num_blocks)
            pieces = summarise(tokens, windows, noise is True).select(chunks.siblings)
        few = None if max_chunks is None else _latest(cutting, layout, summaries)
        if few is not None:
            partial = few.join(_windows(tokens, block_x, layout, is_causal, bias), block_x, dropout=slot_dropout)
        elif chunks.hidden is not None and bias is None and not slot_dropout and summaries.spread is None:
            partial = _windows_and_chunks(tokens, block_x, layout, is_causal, summaries, *chunks.hidden)
        else:
            far = summaries.read(block_x, chunks.seen(), dropout=slot_dropout)
            partial = merge([far, _windows(tokens, block_x, layout, is_causal, bias)])
        if pieces is not None:
            partial = pieces.join(partial, block_x, dropout=slot_dropout)
    return tokens.finish(Partial(blocks.join(partial.output), blocks.join(partial.log_mass.unsqueeze(-1)).squeeze(-1)))


def _latest(cutting: Cutting, layout: Layout, summaries: Summaries) -> Summaries | None:
    """The few chunks that every window reads, with `max_chunks`; `None` if it reads all of them singly."""
    around, window = layout.windows, cutting.window_size
    assert cutting.max_chunks is not None
    assert cutting.chunk_size is not None
    per_window, skipped = window // cutting.chunk_size, around.left // window
    return latest_chunks(summaries, cutting.max_chunks, around.blocks.num_blocks, per_window, skipped)


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


def _windows(tokens: Tokens, block_x: Tensor, layout: Layout, is_causal: bool, bias: Tensor | None) -> Partial:
    """Exact attention of every window's queries to the keys it sees."""
    around, seen = layout.windows, _seen(tokens, layout)
    if is_causal:
        earlier = causal_visibility(around.blocks.size, around.left + around.blocks.size, block_x.device)
        seen = earlier if seen is None else seen & earlier
    keys, values = around.split(tokens.y), around.split(tokens.value)
    if bias is None:
        return exact_partial(block_x, keys, values, seen)
    logits = block_x.to(bias.dtype) @ keys.to(bias.dtype).transpose(-1, -2) + bias
    return weigh(mask_logits(logits, seen), values)


def _windows_and_chunks(
    tokens: Tokens,
    block_x: Tensor,
    layout: Layout,
    is_causal: bool,
    summaries: Summaries,
    hidden_from: Tensor,
    hidden_to: Tensor,
) -> Partial:
    """The windows and all chunks under one softmax, if every window reads all chunks but a range."""
    lead = block_x.shape[:2]

    def grouped(x: Tensor) -> Tensor:
        return x.expand(*lead, *x.shape[2:]).flatten(0, 1)

    seen = _seen(tokens, layout)
    both = windows_chunks(
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
    return Partial(both.output.unflatten(0, lead), both.log_mass.unflatten(0, lead))


def _fit_bias(bias: Tensor, cutting: Cutting, layout: Layout, heads: int) -> Tensor:
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
