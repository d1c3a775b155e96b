r"""How far FAVOR+ and FAVOR# can be off: moments of the kernel estimate in closed form.

One feature's estimate of `exp(x . y)` is `F(w) = f(w, x) f(w, y)` (`ops.favor.attention`). With `z = x' + y'`, the sum
of query and key in the coordinates of the features, and `a_l` the diagonal of `A`, the moment of order `p` exists
where `4 p a_l < 1`:

    log( E[F^p] / exp(p x.y) ) = sum_l  p/2 log(1 - 4 a_l) - 1/2 log(1 - 4 p a_l) + p (p - 1) / (2 (1 - 4 p a_l)) z_l^2

which is 0 for `p = 1`. Centring multiplies `F` by a constant of the pair, so relative moments need nothing else.
Everything here is a diagnosis and takes no part in the attention itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from ..inputs import scale_inputs
from .statistics import FavorStatistics, token_moments


def log_relative_moment(
    query: Tensor,
    key: Tensor,
    statistics: FavorStatistics | None = None,
    *,
    order: float = 2,
    scaling: float | None = None,
) -> Tensor:
    """`log( E[F^order] / exp(order * x.y) )` of one feature's kernel estimate `F`, for every pair.

    Source: order 2: Likhosherstov et al. 2022, arXiv:2205.15317, Theorem 3.1 and Likhosherstov et al. 2023,
        arXiv:2302.00787. Differs from them: any order, relative to the kernel, with centring.

    Args:
        query: `[batch, heads, queries, head_dim]`, unscaled.
        key: `[batch, heads, keys, head_dim]`, unscaled.
        statistics: FAVOR#'s constants; `None` is FAVOR+.
        order: The moment; 2 gives the variance, 4 the error of a sample variance.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
    Returns: `[batch, heads, queries, keys]`, float32 at least.
    Raises: InputError where `4 * order * shape >= 1`: that moment is infinite.
    Cost: O(queries * keys * head_dim). Random: no.
    """
    x, y, shape = _coordinates(query, key, statistics, scaling)
    constant, weight = _coefficients(shape, order)
    rooted = weight.abs().sqrt()
    sign = 1.0 if order * (order - 1) >= 0 else -1.0
    x, y = x * rooted, y * rooted
    squares = _squared_sums(x, y)
    return constant[..., None] + sign * squares


def mean_log_second_moment(
    query: Tensor,
    key: Tensor,
    statistics: FavorStatistics | None = None,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_cross: bool = False,
) -> Tensor:
    """Mean over all pairs of real tokens of `log( E[F^2] / exp(2 x.y) )`: what FAVOR#'s statistics minimise.

    A feature needs about the exponential of this many draws to estimate a typical kernel value. The logarithm is a
    quadratic form of the tokens, so its mean needs only their first two moments and no pairs.

    Source: Likhosherstov et al. 2023, arXiv:2302.00787, section 3 (there without the terms free of the statistics).

    Args:
        query, key, statistics, scaling: As in `log_relative_moment`.
        key_mask: `[batch, keys]` bool, True where a token is real.
        is_cross: Queries and keys are of different sequences, so `key_mask` says nothing about queries. Implied by
            different lengths.
    Returns: `[batch, heads]`, float32 at least.
    Cost: O(tokens * head_dim), with dense transforms O(tokens * head_dim^2). Random: no.
    """
    x, y, shape = _coordinates(query, key, statistics, scaling)
    moments = token_moments(x, y, key_mask, is_cross=is_cross)
    constant, weight = _coefficients(shape, 2)
    squares = moments.query_scatter / moments.query_count.clamp_min(1)
    squares = squares + moments.key_scatter / moments.key_count.clamp_min(1)
    squares = squares + (moments.query_mean + moments.key_mean).square()
    return (constant + (squares * weight).sum(-1)).squeeze(-1)


def kernel_relative_variance(
    query: Tensor,
    key: Tensor,
    num_features: int,
    statistics: FavorStatistics | None = None,
    *,
    orthogonal: bool = False,
    scaling: float | None = None,
) -> Tensor:
    r"""Variance of the kernel estimate with `num_features` directions, relative to `exp(2 x.y)`, for every pair.

    Independent directions: `(S - 1) / M` with `S` the relative second moment of one feature. Orthogonal directions
    of chi-distributed length, with `A = a I`: two features of one block of `D` have

        E[F_1 F_2] / exp(2 x.y) = 1F1(D; D/2; |z|^2/2) exp(-|z|^2) <= 1,

    whatever `a` is, so orthogonality never adds variance there. For one `a` per coordinate the law of two orthogonal
    features has no such form and no bound is known to us; for directions of fixed length (`regularized`) the estimate
    is biased and `S` is not its second moment. Neither is computed.

    Source: independent: as `log_relative_moment`. Orthogonal: derived here from the joint law of two directions (their
        sum has a uniform direction and squared length chi^2 with 2 D degrees of freedom); Choromanski et al. 2021,
        arXiv:2009.14794, Theorem 2 bounds the gain for `A = 0`.

    Args:
        query, key, statistics, scaling: As in `log_relative_moment`.
        num_features: M.
        orthogonal: Directions in orthogonal blocks (`draw_projection`) rather than independent ones.
    Returns: `[batch, heads, queries, keys]`, float32 at least.
    Raises: UnsupportedError for orthogonal directions with different `a` per coordinate.
    Cost: O(queries * keys * head_dim). Random: no. Reads values if `orthogonal`.
    """
    if num_features < 1:
        raise InputError(f"num_features must be at least 1; got {num_features!r}.")
    x, y, shape = _coordinates(query, key, statistics, scaling)
    own = torch.expm1(log_relative_moment(query, key, statistics, scaling=scaling)) / num_features
    if not orthogonal:
        return own
    if not torch.equal(shape, shape[..., :1].expand_as(shape)):
        raise UnsupportedError(
            "The variance of orthogonal features is known for one shape parameter only ('gerf', 'saderf', 'aderf' or"
            " no statistics); got different ones per coordinate. Use orthogonal=False for the independent ones."
        )
    dim = x.shape[-1]
    whole, rest = divmod(num_features, dim)
    pairs = whole * dim * (dim - 1) + rest * (rest - 1)
    half = _squared_sums(x, y).clamp_min(0) / 2
    return own + torch.expm1(_log_orthogonal_pair(half, dim)) * (pairs / num_features**2)


def predicted_output_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_features: int,
    statistics: FavorStatistics | None = None,
    *,
    scaling: float | None = None,
) -> Tensor:
    r"""`E|o_t - softmax_t|^2` of the self-normalised attention output, to first order in `1 / num_features`.

    With softmax weights `p` and output `o`, one draw moves the output by `sum_n p_n F_n / exp(x.y_n) (v_n - o)`
    (delta method), whose second moment needs `E[f(w,x)^2 f(w,y) f(w,y')]`, a Gaussian integral:

        log( . / exp(x.y + x.y') ) = sum_l  log(1 - 4 a_l) - 1/2 log(1 - 8 a_l)
                                     + (2 a_l (z_l^2 + z'_l^2) + (1 - 4 a_l) z_l z'_l) / (1 - 8 a_l)

    Good once the result is small beside `|softmax|^2`; where `num_features` is below the relative second moments it
    exceeds what self-normalisation allows (the output stays among the values) and only says that features are too
    few. Independent directions; orthogonal ones usually do better.

    Source: the delta method for ratio estimators (Owen 2013, Monte Carlo theory, section 9.2) with the moments of
        Likhosherstov et al. 2023, arXiv:2302.00787.

    Args:
        query: `[batch, heads, queries, head_dim]`: a sample of them is enough.
        key, value: `[batch, heads, keys, head_dim]` of real tokens.
        num_features: M.
        statistics, scaling: As in `log_relative_moment`.
    Returns: `[batch, heads, queries]`, float32 at least.
    Cost: O(queries * keys^2 * head_dim) time, O(keys^2) memory per head. Random: no.
    """
    if num_features < 1:
        raise InputError(f"num_features must be at least 1; got {num_features!r}.")
    x, y, shape = _coordinates(query, key, statistics, scaling)
    value = value.to(x.dtype)
    plain_x, plain_y = scale_inputs(query.to(x.dtype), key.to(x.dtype), scaling)
    weights = torch.softmax(plain_x @ plain_y.mT, -1)
    constant, _ = _coefficients(shape, 2)
    own, mixed = 2 * shape / (1 - 8 * shape), (1 - 4 * shape) / (1 - 8 * shape)
    errors = []
    for t in range(x.shape[2]):
        z = x[:, :, t : t + 1] + y
        side = (z.square() * own).sum(-1)
        ratio = (constant[..., None] + side[..., :, None] + side[..., None, :] + (z * mixed) @ z.mT).exp()
        p = weights[:, :, t, :, None]
        step = p * (value - (p * value).sum(-2, keepdim=True))
        errors.append(((ratio @ step) * step).sum((-2, -1)))
    return torch.stack(errors, -1) / num_features


# -- helpers --------------------------------------------------------------------------------------------------------


def _coordinates(
    query: Tensor, key: Tensor, statistics: FavorStatistics | None, scaling: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys in the coordinates of the features, and the diagonal of `A`, `[batch or 1, heads, 1, dim]`."""
    dtype = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    x, y = scale_inputs(query.to(dtype), key.to(dtype), scaling)
    if statistics is None:
        return x, y, x.new_zeros(1, 1, 1, x.shape[-1])
    return *statistics.transform(x, y), statistics.shape.to(x)


def _squared_sums(x: Tensor, y: Tensor) -> Tensor:
    """`|x + y|^2` of all pairs, `[..., queries, keys]`."""
    return x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] + 2 * x @ y.mT


def _coefficients(shape: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """Of a log relative moment: the constant `[batch or 1, heads, 1]`, and the factors of `z_l^2`."""
    room = 1 - 4 * order * shape
    if not bool((room > 0).all()):
        raise InputError(
            f"A moment of order {order} is infinite where 4 * order * shape >= 1; got shape up to"
            f" {float(shape.max())}. Use a lower order."
        )
    constant = (order / 2 * (1 - 4 * shape).log() - room.log() / 2).sum(-1)
    return constant, order * (order - 1) / 2 / room


def _log_orthogonal_pair(half: Tensor, dim: int) -> Tensor:
    """`log( 1F1(dim; dim/2; t) exp(-2 t) )` for `t = half`, by a series of positive terms.

    With Kummer's transformation the series ends after `dim / 2` terms; for odd `dim` it would not, and its terms
    would change sign, so the plain one is used as far as its terms matter.
    """
    if dim % 2:
        top = float(half.max()) if half.numel() else 0.0
        count, first, damping = int(2 * top + 12 * math.sqrt(2 * top + dim) + 60), float(dim), 2.0
    else:
        count, first, damping = dim // 2, -dim / 2, 1.0
    log_half = half.log()
    total, term = torch.zeros_like(half), torch.zeros_like(half)  # logs of the sum and of the newest term
    for k in range(count):
        # Ratio of neighbouring terms; (-dim/2 + k) and -t change sign together.
        term = term + math.log(abs(first + k) / ((dim / 2 + k) * (k + 1))) + log_half
        total = torch.logaddexp(total, term)
    return total - damping * half
