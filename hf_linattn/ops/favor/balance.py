"""Coordinates in which queries and keys have equal second moments, and the principal axes of their sum.

Source: Likhosherstov et al. 2023, arXiv:2302.00787, section 3 (ADERF, SDERF). The balanced coordinates are those of
balanced truncation (Moore 1981): `x2 = L L'`, `L' y2 L = V S^2 V'`, then `P = L^-T V S^(1/2)`, `Q = L V S^(-1/2)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .moments import diagonal_balance

# Second moments below this fraction of the largest one count as this fraction, which bounds the condition number of a
# dense transform by its inverse square root: float32 products of transformed vectors keep their accuracy.
_LEAST_MOMENT = 1e-6


def dense_transforms(variant: str, x2: Tensor, y2: Tensor, x_mean: Tensor, y_mean: Tensor) -> tuple[Tensor, Tensor]:
    """`P` of the queries and `Q` of the keys, `P Q' = I`, for a dense variant of `ops.favor.statistics`.

    Args:
        x2, y2: Second moments, `[..., dim, dim]`. x_mean, y_mean: Means that these include, `[..., 1, dim]`.
    """
    same = torch.eye(x2.shape[-1], dtype=x2.dtype, device=x2.device).expand_as(x2)
    forward, back = (same, same) if variant == "sderf" else _balance(x2, y2)
    if variant == "aderf":
        # Balanced coordinates are unique but for a rotation; the symmetric choice depends continuously on the data.
        finite = forward.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        axes, roots, _ = torch.linalg.svd(torch.where(finite, forward, same))
        roots = roots.unsqueeze(-2)
        return (axes * roots) @ axes.mT, (axes / roots) @ axes.mT
    common = (x_mean @ forward).mT @ (y_mean @ back)
    axes, _ = _eigen(forward.mT @ x2 @ forward + back.mT @ y2 @ back + common + common.mT)
    forward, back = forward @ axes, back @ axes
    # An axis has no sign of its own; fixed here, or rounding would decide which features a row gets.
    sign = forward.gather(-2, forward.abs().argmax(-2, keepdim=True)).sign()
    return forward * sign, back * sign


def _balance(x2: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
    """`P`, `Q` with `P Q' = I` and `P' x2 P = Q' y2 Q` (a diagonal matrix), after flooring both second moments."""
    (x_axes, x_part, x_top), (y_axes, y_part, y_top) = (_floored(z) for z in (x2, y2))
    root, inverse = x_axes * x_part.sqrt(), x_axes * x_part.rsqrt()
    axes, squares = _eigen(root.mT @ (y_axes * y_part) @ y_axes.mT @ root)
    squares = squares.clamp_min(torch.finfo(squares.dtype).eps * squares.amax(-1, keepdim=True))
    part = squares.sqrt().sqrt()
    scale = diagonal_balance(x_top, y_top)
    return inverse @ (axes * part) * scale, root @ (axes / part) / scale


def _floored(second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Axes, floored eigenvalues relative to the largest `[..., 1, dim]`, and the largest one `[..., 1, 1]`."""
    top = second.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp_min(0)
    axes, values = _eigen(second / torch.where(top > torch.finfo(top.dtype).tiny, top, 1.0))
    most = values.amax(-1, keepdim=True)
    values = values / torch.where(most > 0, most, 1.0)
    return axes, values.clamp_min(_LEAST_MOMENT), top * most


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (columns) and eigenvalues `[..., 1, dim]`. Rows that are not finite get those of the identity."""
    same = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    finite = matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    values, axes = torch.linalg.eigh(torch.where(finite, matrix, same))
    return axes, values.unsqueeze(-2)
