r"""FAVOR+ and FAVOR#: positive random features of the softmax kernel, evaluated through slots.

With scaled inputs `x`, `y` and a diagonal `A` with `8 A < I`,

    f(w, x) = det(I - 4A)^(1/4) exp( w'Aw + w'(I - 4A)^(1/2) x - |x|^2 / 2 ),    w ~ N(0, I)

has `E[f(w, x) f(w, y)] = exp(x . y)`. `A = 0` is FAVOR+ (Choromanski et al. 2021, arXiv:2009.14794, Lemma 1); `A = a
I` is GERF (Likhosherstov et al. 2022, arXiv:2205.15317); FAVOR# (Likhosherstov et al. 2023, arXiv:2302.00787) also
balances the coordinates of queries and keys first. Every feature is a slot, so `[tokens, features]` only ever appears
as a logit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .exact import attention_function, scale_inputs
from .factored import LogWeights
from .tokens import prepare
from .windowed import slot_attention

# Any balancing factor is exact; this keeps its square finite in float32 for degenerate statistics.
_BALANCE_LIMIT = 2.0**20


class FavorStatistics(NamedTuple):
    """Data-dependent constants of FAVOR#, in scaled coordinates; each `[batch or 1, heads, 1, head_dim]`.

    Any values are exact in expectation; good ones reduce the variance.

    query_mean, key_mean: Taken off before the features (softmax does not change: see `favor_log_features`).
    balance: `psi`; queries are multiplied by it and keys divided.
    shape: The diagonal of `A`, below 1/8.
    """

    query_mean: Tensor
    key_mean: Tensor
    balance: Tensor
    shape: Tensor


def neutral_statistics(num_heads: int, head_dim: int) -> FavorStatistics:
    """The statistics with which FAVOR# is FAVOR+."""
    zero = torch.zeros(1, num_heads, 1, head_dim)
    return FavorStatistics(zero, zero.clone(), torch.ones_like(zero), zero.clone())


def optimal_shape(phi: Tensor) -> Tensor:
    """The `a` of `A = a I` with the least mean log second moment, given `phi = mean |x + y|^2 / head_dim`; in (-inf,
    0].

    Source: Likhosherstov et al. 2022, arXiv:2205.15317, Theorem 3.1.
    """
    return (1 - 2 * phi - ((2 * phi + 1).square() + 8 * phi).sqrt()) / 16


@torch.no_grad()
def favor_statistics(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    variant: str = "saderf",
    centring: bool = True,
    is_cross: bool = False,
) -> FavorStatistics:
    """FAVOR#'s constants from the real tokens of every row and head, without gradient.

    Source: Likhosherstov et al. 2023, arXiv:2302.00787, section 3 (SADERF: a diagonal balance, then GERF). Differs
        from it:
    `centring` takes the means off first, which changes nothing in expectation and reduces the variance.

    Args:
        query, key: `[batch, heads, tokens, head_dim]` of the same tokens (or of two sequences, without a mask).
        key_mask: `[batch, tokens]` bool, True where a token is real.
        variant: "saderf" or "gerf" (no balance).
        is_cross: Queries and keys are of different sequences, so `key_mask` says nothing about queries. Implied by
            different lengths.
    Cost: O(tokens * head_dim). Random: no.
    """
    if variant not in ("saderf", "gerf"):
        raise InputError(f"variant must be 'saderf' or 'gerf'; got {variant!r}.")
    dtype = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    x, y = scale_inputs(query.to(dtype), key.to(dtype), scaling)

    query_mask = None if is_cross or x.shape[2] != y.shape[2] else key_mask
    x_mean, y_mean = _masked_mean(x, query_mask), _masked_mean(y, key_mask)
    if not centring:
        x_mean, y_mean = torch.zeros_like(x_mean), torch.zeros_like(y_mean)
    x, y = x - x_mean, y - y_mean
    x_square, y_square = _masked_mean(x.square(), query_mask), _masked_mean(y.square(), key_mask)
    balance = torch.ones_like(x_square)
    if variant == "saderf":
        both = (x_square > 0) & (y_square > 0)
        ratio = torch.where(both, y_square, 1.0) / torch.where(both, x_square, 1.0)
        balance = ratio.sqrt().sqrt().clamp(1 / _BALANCE_LIMIT, _BALANCE_LIMIT)
    moment = x_square * balance.square() + y_square / balance.square()
    moment = moment + 2 * _masked_mean(x, query_mask) * _masked_mean(y, key_mask)
    shape = optimal_shape(moment.mean(-1, keepdim=True).clamp_min(0)).expand_as(balance)
    return FavorStatistics(x_mean, y_mean, balance, shape)


def _masked_mean(z: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens of each row, `[batch, heads, 1, dim]`."""
    if mask is None:
        return z.mean(2, keepdim=True)
    real = mask[:, None, :, None]
    return z.masked_fill(~real, 0.0).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)


def favor_log_features(
    x: Tensor, y: Tensor, projection: Tensor, statistics: FavorStatistics | None = None
) -> tuple[Tensor, Tensor]:
    r"""Log-features `a[t, j]` of queries and `c[j, n]` of keys with `E[sum_j exp(a + c)] = exp(x . y)`.

    With means `m_x`, `m_y`: `exp(x.y) = exp((x - m_x).(y - m_y)) exp(m_x.y) exp(x.m_y - m_x.m_y)`; the second factor
    goes to the key and the third to the query, so the logits stay on the scale of `x . y` beside exact ones.

    Args:
        x, y: Scaled queries and keys `[batch, heads, tokens, head_dim]`.
        projection: `[heads, features, head_dim]` or `[features, head_dim]`.
    Returns: two tensors `[batch, heads, tokens, features]`.
    """
    query, key = favor_log_weights(x, y, projection, statistics)
    return query.dense(), key.dense()


def favor_log_weights(
    x: Tensor, y: Tensor, projection: Tensor, statistics: FavorStatistics | None = None
) -> tuple[LogWeights, LogWeights]:
    """The same as `favor_log_features`, as dot products of tokens and slots."""
    log_count = torch.tensor(float(projection.shape[-2]), dtype=x.dtype, device=x.device).log()
    if statistics is None:
        own = torch.zeros_like(projection[..., 0])
        query_bias = -x.square().sum(-1, keepdim=True) / 2 - log_count
        return LogWeights(x, query_bias, projection, own), LogWeights(
            y, -y.square().sum(-1, keepdim=True) / 2, projection, own
        )
    x_mean, y_mean, balance, shape = (s.to(x) for s in statistics)
    query_extra = (x * y_mean).sum(-1, keepdim=True) - (x_mean * y_mean).sum(-1, keepdim=True)
    key_extra = (y * x_mean).sum(-1, keepdim=True)
    x, y = (x - x_mean) * balance, (y - y_mean) / balance
    stretch = (1 - 4 * shape).sqrt()
    directions = projection * stretch  # [batch or 1, heads, features, head_dim]
    # w'Aw + log det(I - 4A) / 4, once for the query's factor and once for the key's.
    own = (projection.square() * shape).sum(-1) + stretch.log().sum(-1) / 2
    query_bias = query_extra - x.square().sum(-1, keepdim=True) / 2 - log_count
    key_bias = key_extra - y.square().sum(-1, keepdim=True) / 2
    return LogWeights(x, query_bias, directions, own), LogWeights(y, key_bias, directions, own)


@attention_function
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    statistics: FavorStatistics | None = None,
    window_size: int = 0,
    overlap_window: bool = False,
    num_heavy_keys: int = 0,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    chunk_size: int = 32,
    slot_dropout: float = 0.0,
    is_cross: bool = False,
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
        statistics: FAVOR#'s constants (`favor_statistics`, or calibrated ones). `None` is FAVOR+.
        window_size: Exact local window in tokens (side of the square with a `grid`); 0 for none.
        grid: Height and width in patches of the tokens after the global ones.
        num_global_tokens: Leading tokens that see and are seen exactly (bidirectional only).
        chunk_size: Tokens, a power of two, within which queries and keys meet directly rather than through a state of
            the slots (causal or with a window); changes cost, not the result.
        slot_dropout: Dropout on the weights of the slots.
        is_cross: Queries and keys are of different sequences, so `key_mask` says nothing about queries (bidirectional,
            without window and global tokens). Implied by different lengths.
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`; zeros for padded queries.
    Raises: InputError if shapes do not fit or queries and keys differ where they may not; UnsupportedError for global
        tokens in the causal form.
    Cost: O((queries + keys) * num_features * head_dim). Random: no (but for `slot_dropout`). Epsilon: nowhere.
    """
    if projection.shape[-1] != query.shape[-1] or (projection.ndim == 3 and projection.shape[0] != query.shape[1]):
        raise InputError(
            f"projection must be [heads, features, head_dim] = [{query.shape[1]}, features, {query.shape[-1]}] or"
            f" [features, {query.shape[-1]}]; got {tuple(projection.shape)}."
        )
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise InputError(f"chunk_size must be a power of two; got {chunk_size!r}.")
    x, y = scale_inputs(query, key, scaling)
    projection = projection.to(x)
    if not (is_causal or window_size or num_global_tokens or num_heavy_keys):
        visible = None if key_mask is None else key_mask[:, None, :, None]
        is_self = x.shape[2] == y.shape[2] and not is_cross
        if visible is not None:
            # Before anything is computed, so that inf or NaN in the padding reaches neither values nor gradients.
            y, value = y.masked_fill(~visible, 0.0), value.masked_fill(~visible, 0.0)
            x = x.masked_fill(~visible, 0.0) if is_self else x
        query_weights, key_weights = favor_log_weights(x, y, projection, statistics)
        output = query_weights.read(key_weights.masked(visible).summarise(value), dropout=slot_dropout).output
        return output.masked_fill(~visible, 0.0) if is_self and visible is not None else output
    if is_cross:
        raise InputError(
            "Cross-attention (is_cross=True) needs is_causal=False, window_size=0 and num_global_tokens=0; got"
            f" {is_causal}, {window_size} and {num_global_tokens}."
        )
    tokens = prepare(x, y, value, key_mask, is_causal=is_causal, num_global_tokens=num_global_tokens, grid=grid)
    if tokens.y.shape[2] == 0:
        return tokens.finish(None)
    query_weights, key_weights = favor_log_weights(tokens.x, tokens.y, projection, statistics)
    return tokens.finish(
        slot_attention(
            tokens,
            query_weights,
            key_weights,
            is_causal=is_causal,
            window_size=window_size,
            overlap_window=overlap_window,
            num_heavy_keys=num_heavy_keys,
            chunk_size=chunk_size,
            dropout=slot_dropout,
        )
    )
