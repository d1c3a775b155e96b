"""k-means of every head's points at once, from an explicit seed: the same on every machine and rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError


@torch.no_grad()
def kmeans(points: Tensor, num_centroids: int, *, seed: int, max_iterations: int = 10) -> Tensor:
    """Centroids with a small mean squared distance to the points, for every head on its own.

    Source: Lloyd 1982; start: Arthur and Vassilvitskii 2007 (k-means++). Differs from them: a centroid that no point
    is closest to moves to the point farthest from its centroid (the next one to the next, and so on).

    Args:
        points: `[heads, points, dim]`, finite. Points may coincide; then centroids may.
        num_centroids: At most the number of points.
        seed: Any integer.
    Returns: `[heads, num_centroids, dim]`, dtype and device of `points`; computed in float64 on the CPU.
    Raises: InputError if there are too few points or some are not finite.
    Cost: O(max_iterations * heads * points * num_centroids * dim), `[heads, points, num_centroids]` distances.
    """
    if points.ndim != 3 or not 1 <= num_centroids <= points.shape[1]:
        raise InputError(
            f"{num_centroids} centroids need points [heads, points, dim] with at least as many points; got"
            f" {tuple(points.shape)}."
        )
    if not bool(points.isfinite().all()):
        raise InputError("points must be finite; got inf or NaN.")
    given = points
    points = points.detach().to("cpu", torch.float64)
    centroids = _spread_start(points, num_centroids, seed)
    nearest = None
    for _ in range(max_iterations):
        distance, now = _squared_distances(points, centroids).min(-1)
        if nearest is not None and torch.equal(now, nearest):
            break
        nearest = now
        centroids = _means(points, now, distance, num_centroids)
    return centroids.to(given)


def _squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """`[heads, points, centroids]`."""
    squares = points.square().sum(-1, keepdim=True) + centroids.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * points @ centroids.transpose(-1, -2)).clamp_min(0)


def _spread_start(points: Tensor, num_centroids: int, seed: int) -> Tensor:
    """Points drawn one after the other with probability proportional to the squared distance to those drawn before."""
    heads, count, _ = points.shape
    generator = torch.Generator(device="cpu").manual_seed(seed)
    weight = torch.ones(heads, count, dtype=points.dtype)
    chosen: list[Tensor] = []
    for _ in range(num_centroids):
        cumulative = weight.cumsum(-1)
        total = cumulative[:, -1:]
        uniform = torch.rand(heads, 1, generator=generator, dtype=points.dtype)
        index = torch.searchsorted(cumulative, uniform * total, right=True)
        # Only coinciding points are left: any of them.
        index = torch.where(total > 0, index, (uniform * count).long()).clamp_max(count - 1)
        chosen.append(points.gather(1, index.unsqueeze(-1).expand(-1, -1, points.shape[-1])))
        distance = (points - chosen[-1]).square().sum(-1)
        weight = distance if len(chosen) == 1 else torch.minimum(weight, distance)
    return torch.cat(chosen, dim=1)


def _means(points: Tensor, nearest: Tensor, distance: Tensor, num_centroids: int) -> Tensor:
    """Mean of the points of every centroid; the farthest points, one each, for centroids without any."""
    heads, _, dim = points.shape
    index = nearest.unsqueeze(-1)
    sums = points.new_zeros(heads, num_centroids, dim).scatter_add(1, index.expand(-1, -1, dim), points)
    counts = points.new_zeros(heads, num_centroids, 1).scatter_add(1, index, torch.ones_like(points[..., :1]))
    empty = counts == 0
    farthest = distance.topk(num_centroids, dim=-1).indices
    place = farthest.gather(1, (empty.squeeze(-1).cumsum(-1) - 1).clamp_min(0))
    instead = points.gather(1, place.unsqueeze(-1).expand(-1, -1, dim))
    return torch.where(empty, instead, sums / counts.clamp_min(1))
