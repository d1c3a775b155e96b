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
    double = 2 * phi
    return (1 - double - ((double + 6) * double + 1).sqrt()) / 16


def diagonal_fit(mean: Tensor, second: Tensor, variant: str, centring: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of coordinates of a variant that has no more, their squares, and `a`.

    Args:
        mean: Of queries and of keys, `[2, batch or 1, heads or 1, 1, dim]`. second: Moments about it, alike.
    Returns: twice the same shape, and `[batch or 1, heads or 1, 1, 1]`.
    """
    # Without centring moments are those about zero.
    second = without_rounding(second, mean) if centring else torch.addcmul(second, mean, mean)
    if variant == "saderf":
        forward = diagonal_balance(*second.unbind(0))
        transform = torch.stack([forward, forward.reciprocal()])
        square = transform.square()
        second = second * square
    else:
        transform = square = torch.ones_like(second)
    phi = second.sum((0, -1)).unsqueeze(-1) / mean.shape[-1]
    if not centring:  # what queries and keys have in common
        phi = (phi + 2 * mean.prod(0).mean(-1, keepdim=True)).clamp_min(0)
    return transform, square, optimal_shape(phi)


def diagonal_constants(mean: Tensor, second: Tensor, variant: str, centring: bool) -> Constants:
    """The constants of such a variant; the arguments are those of `diagonal_fit`."""
    transform, _, shape = diagonal_fit(mean, second, variant, centring)
    x_mean, y_mean = (mean if centring else torch.zeros_like(mean)).unbind(0)
    forward, back = transform.unbind(0)
    return x_mean, y_mean, forward, back, shape.expand_as(forward)


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
