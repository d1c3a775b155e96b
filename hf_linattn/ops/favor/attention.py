r"""FAVOR+ and FAVOR#: positive random features of the softmax kernel, evaluated through slots.

With scaled inputs `x`, `y` and a diagonal `A` with `8 A < I`,

    f(w, x) = det(I - 4A)^(1/4) exp( w'Aw + w'(I - 4A)^(1/2) x - |x|^2 / 2 ),    w ~ N(0, I)

has `E[f(w, x) f(w, y)] = exp(x . y)`. `A = 0` is FAVOR+ (Choromanski et al. 2021, arXiv:2009.14794, Lemma 1); `A = a
I` is GERF (Likhosherstov et al. 2022, arXiv:2205.15317); FAVOR# (Likhosherstov et al. 2023, arXiv:2302.00787) also
changes the coordinates of queries and keys first (`ops.favor.statistics`). Every feature is a slot, so `[tokens,
features]` only ever appears as a logit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..exact import ONE_WINDOW, in_one_window
from ..inputs import check_grid, check_projection, checked_attention, factor_of, prepare_tokens
from ..noise import SlotDropout
from ..short_attention import attention_with_slots
from ..slot_attention import SlotOptions, slots_alone
from .features import favor_feature_map
from .fitted import RowFit, fitted_weights
from .statistics import FavorStatistics, RowStatistics


@checked_attention(in_half=("cpu", "cuda"))
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    statistics: FavorStatistics | RowFit | None = None,
    window_size: int = 0,
    overlap_window: bool = False,
    num_heavy_keys: int = 0,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    chunk_size: int | None = None,
    slot_dropout: float | SlotDropout = 0.0,
    is_cross: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    real_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """FAVOR+ (or FAVOR#, given `statistics`) attention.

    Source: Choromanski et al. 2021, arXiv:2009.14794, Algorithm 1, and the papers named in this module. Differs from
    them: no epsilon, log space, slots, an optional exact window and global tokens in the same softmax.

    Args:
        query: `[batch, heads, queries, head_dim]`. In the causal form queries may be fewer than keys: the last ones.
        key, value: `[batch, heads, keys, head_dim]`.
        projection: `[heads, num_features, head_dim]` or `[num_features, head_dim]`, rows from N(0, I).
        key_mask: `[batch, keys]` bool, True where a key is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        is_causal: No query sees a later key.
        statistics: FAVOR#'s constants: those of each row (`favor_statistics`, or a `RowFit`, which takes them here;
            bidirectional only) or of other data (`FavorMoments`). `None` is FAVOR+.
        window_size: Exact local window in tokens (side of the square with a `grid`); 0 for none.
        overlap_window: The window reaches half a window beyond each side of its block, in the causal form a whole
            window to the left. Needs an even `window_size`; not with a `grid`.
        num_heavy_keys: That many keys of every row and head, those with most weight, are seen exactly by every query
            (bidirectional only).
        grid: Height and width in patches of the tokens after the global ones.
        num_global_tokens: Leading tokens that see and are seen exactly (bidirectional only).
        chunk_size: Tokens, a power of two, within which queries and keys meet directly rather than through a state of
            the slots (causal or with a window); changes cost, not the result. `None`: what was measured to be fast.
        slot_dropout: Dropout on the weights of the slots.
        is_cross: Queries and keys are of different sequences, so `key_mask` says nothing about queries (bidirectional,
            without window and global tokens). Implied by different lengths.
        cu_seqlens: `[sequences + 1]` int32 or int64, where packed sequences start among the tokens of a batch of one,
            and where the last one ends. Each gives what it would give alone.
        max_seqlen: Tokens of the longest of these sequences, or more. Needed while compiling, where all have rows of
            this length.
        real_first: The rows are as `RowGroups.split` makes them, real tokens first and zeros behind, which is not
            checked: nothing is moved then. Of queries of the padding the output has no meaning.
        backend: What the kernels run on: "torch", "triton" (raises where it cannot run) or "auto"; `None` for that of
            `use_backend`. Changes cost, not the result.
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`; zeros for padded queries.
    Raises: InputError if shapes do not fit or queries and keys differ where they may not; UnsupportedError for global
        tokens in the causal form.
    Cost: O((queries + keys) * num_features * head_dim). Random: no (but for `slot_dropout`). Epsilon: nowhere.
    """
    check_projection(projection, query)
    options = SlotOptions(is_causal, window_size, overlap_window, num_heavy_keys, chunk_size, slot_dropout)
    options.check(grid)
    if is_causal and isinstance(statistics, (RowStatistics, RowFit)):
        raise InputError(
            "Causal attention needs statistics of other data; got those that `favor_statistics` has taken from the row"
            " itself, which know later tokens. Use FavorMoments.empty(...).update(...).statistics(variant)."
        )
    scaling = factor_of(query, scaling)
    projection = projection.to(torch.promote_types(query.dtype, torch.float32))
    if not (is_causal or window_size or num_global_tokens or num_heavy_keys or overlap_window):
        if grid is not None:
            check_grid(key.shape[2], grid, key_mask)
        root = scaling**0.5  # of FAVOR+ a factor of the few directions, of FAVOR# one of the tokens
        if isinstance(statistics, RowFit):
            statistics = statistics.statistics(query, key, key_mask=key_mask, scaling=scaling, is_cross=is_cross)
        if statistics is not None:
            query, key, root = query * root, key * root, 1.0
        feature_map = favor_feature_map(query, projection, statistics, root=root)
        return slots_alone(query, key, value, feature_map, key_mask=key_mask, is_cross=is_cross, dropout=slot_dropout)
    if is_cross:
        raise InputError(
            "Cross-attention (is_cross=True) needs is_causal=False, window_size=0 and num_global_tokens=0; got"
            f" {is_causal}, {window_size} and {num_global_tokens}."
        )
    if in_one_window(query, key, key_mask, **options.window(num_global_tokens, grid)):
        return ONE_WINDOW
    tokens = prepare_tokens(
        *(query, key, value, key_mask, scaling, is_causal, num_global_tokens, grid),
        real_first=real_first,
        scaled=statistics is not None,
    )
    if tokens.key.shape[2] == 0:
        return tokens.finish(None)
    if isinstance(statistics, RowFit):
        is_wide = tokens.query.dtype in (torch.float32, torch.float64)
        if statistics.is_diagonal and is_wide and not num_global_tokens and not torch.compiler.is_compiling():
            query_weights, key_weights = fitted_weights(tokens, projection, statistics)
            return tokens.finish(attention_with_slots(tokens, options, query_weights, key_weights))
        statistics = statistics.statistics(query, key, key_mask=key_mask, scaling=scaling)
    feature_map = favor_feature_map(tokens.query, projection, statistics, root=tokens.root)
    query_weights, key_weights = feature_map.query_weights(tokens.query), feature_map.key_weights(tokens.key)
    return tokens.finish(attention_with_slots(tokens, options, query_weights, key_weights))
