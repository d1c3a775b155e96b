"""FAVOR#'s constants in closed form, from first and second moments: all rows and heads at once.

Source: Likhosherstov et al. 2023, arXiv:2302.00787, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .balance import dense_transforms
from .moments import diagonal_balance, without_rounding

Constants = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # the fields of `FavorStatistics`


def optimal_shape(phi: Tensor) -> Tensor:
    """The `a` with the least mean log second moment, in (-inf, 0], elementwise.

    `phi` is the mean of `(x_l + y_l)^2` over pairs: per coordinate, or over all coordinates for `A = a I`.

    Source: Likhosherstov et al. 2022, arXiv:2205.15317, Theorem 3.1; per coordinate: Likhosherstov et al. 2023,
        arXiv:2302.00787, section 3.
    """
    return (1 - 2 * phi - ((2 * phi + 1).square() + 8 * phi).sqrt()) / 16


def diagonal_constants(mean: Tensor, second: Tensor, variant: str, centring: bool) -> Constants:
    """The constants of a variant whose transforms are factors of coordinates.

    Args:
        mean: Of queries and of keys, `[2, batch or 1, heads or 1, 1, dim]`. second: Moments about it, alike.
    """
    second = without_rounding(second, mean) if centring else second + mean.square()
    (x_mean, y_mean), (x2, y2) = mean, second
    if variant == "saderf":
        forward = diagonal_balance(x2, y2)
        square = forward.square()
        back, phi = forward.reciprocal(), torch.addcdiv(x2 * square, y2, square)
    else:
        back = forward = torch.ones_like(x2)
        phi = x2 + y2
    if not centring:  # moments about zero, with what queries and keys then have in common
        phi = phi + 2 * x_mean * y_mean
        x_mean, y_mean = torch.zeros_like(mean)
    shape = optimal_shape(phi.mean(-1, keepdim=True).clamp_min(0)).expand_as(phi)
    return x_mean, y_mean, forward, back, shape


def dense_constants(mean: Tensor, second: Tensor, variant: str, centring: bool) -> Constants:
    """The same of a variant whose transforms are matrices; second moments `[.., dim, dim]`.

    Cost: for every row and head up to four eigenvalue problems (or one and a singular value decomposition) of size
    `dim`, all rows and heads in one call: milliseconds for each on a CPU core, however short the rows are.
    """
    zero = torch.zeros_like(mean)
    if centring:
        (x_offset, y_offset), (x_mean, y_mean) = mean, zero
        x2, y2 = without_rounding(second, mean)
    else:
        (x_offset, y_offset), (x_mean, y_mean) = zero, mean
        x2, y2 = second + mean.mT @ mean
    forward, back = dense_transforms(variant, x2, y2, x_mean, y_mean)
    phi = ((x2 @ forward) * forward + (y2 @ back) * back).sum(-2, keepdim=True)
    phi = phi + 2 * (x_mean @ forward) * (y_mean @ back)
    if variant not in ("sderf", "dense"):
        phi = phi.mean(-1, keepdim=True).expand_as(phi)
    return x_offset, y_offset, forward, back, optimal_shape(phi.clamp_min(0))
