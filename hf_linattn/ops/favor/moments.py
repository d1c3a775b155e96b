"""First and second moments of tokens, their union, and the factors that balance those of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor, Tensor]  # count, mean and scatter

_PIECE = 1024  # tokens
# Any balancing factor is exact; this keeps its square finite in float32 for degenerate statistics.
_BALANCE_LIMIT = 2.0**20


def row_moments(z: Tensor, mask: Tensor | None, dense: bool) -> Moments:
    """Count, mean and scatter (sum of outer products about the mean) of the real tokens of each row.

    Args:
        z: `[batch, heads, tokens, dim]`. mask: `[batch, tokens]` bool, True where a token is real.
        dense: The whole scatter `[batch, heads, dim, dim]`, in float64 where the device has it; otherwise its diagonal
            `[batch, heads, 1, dim]`, in float32 at least.
    """
    count, mean, scatter = _moments(z, mask, dense)
    if not isinstance(count, Tensor):
        count = torch.full((1, 1, 1, 1), float(count), dtype=mean.dtype, device=z.device)
    return count, mean, scatter


def row_spread(z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean, and variance of every coordinate, of the real tokens of each row, `[batch, heads, 1, dim]`."""
    count, mean, scatter = _moments(z, mask, dense=False)
    return mean, scatter / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))


def _moments(z: Tensor, mask: Tensor | None, dense: bool) -> tuple[Tensor | int, Tensor, Tensor]:
    """`row_moments`; the count is an integer without a mask."""
    half = z.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float64 if dense and z.device.type != "mps" else torch.float32 if half else z.dtype
    # In pieces that stay in the processor's cache; a compiler or another device does better with the whole.
    size = _PIECE if z.device.type == "cpu" and not torch.compiler.is_compiling() else max(z.shape[2], 1)
    count: Tensor | int
    if mask is None:
        pieces = z.split(size, 2)
        count = z.shape[2]
        padding: Sequence[Tensor | None] = [None] * len(pieces)
    else:
        mask = mask.to(z.device)[:, None, :, None]
        pieces, padding = z.masked_fill(~mask, 0.0).split(size, 2), (~mask).split(size, 2)
        count = mask.sum(2, keepdim=True).to(dtype)
    total = _sum([piece.sum(2, keepdim=True, dtype=dtype) for piece in pieces])
    mean = total / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
    scatters = []
    for piece, hidden in zip(pieces, padding, strict=True):
        centred = piece.to(dtype) - mean
        centred = centred if hidden is None else centred.masked_fill(hidden, 0.0)
        scatters.append(centred.mT @ centred if dense else centred.square_().sum(2, keepdim=True))
    return count, mean, _sum(scatters)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Of two disjoint sets of tokens together; Chan, Golub and LeVeque 1979."""
    total = a[0] + b[0]
    share = b[0] / total.clamp_min(1)
    step = b[1] - a[1]
    between = step.mT @ step if a[2].shape[-2] == a[2].shape[-1] else step.square()
    return total, a[1] + step * share, a[2] + b[2] + between * (a[0] * share)


def without_rounding(second: Tensor, mean: Tensor) -> Tensor:
    """Central moments of equal tokens are 0, not what rounding of their mean leaves: balancing would amplify it."""
    least = (16 * torch.finfo(mean.dtype).eps) ** 2
    if second.shape[-2] == 1:
        return second.masked_fill(torch.addcmul(second, mean, mean, value=-least) <= 0, 0.0)
    noise, top = least * mean.square().amax(-1, keepdim=True), second.diagonal(dim1=-2, dim2=-1).amax(-1)
    return second.masked_fill(top[..., None, None] <= noise, 0.0)


def diagonal_balance(x2: Tensor, y2: Tensor) -> Tensor:
    """Factors of the queries with which both sides have equal second moments per coordinate; 1 where one is 0."""
    ratio = (y2 / x2).masked_fill(torch.minimum(x2, y2) <= 0, 1.0)
    return ratio.sqrt().sqrt().clamp(1 / _BALANCE_LIMIT, _BALANCE_LIMIT)
