"""The slots of FAVOR+ and FAVOR#: what of the log-features depends on the layer alone, and what on each token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.half_norm import half_norm
from ..slot_weights import LinearSlotWeights
from .statistics import FavorStatistics


@dataclass(frozen=True)
class FavorFeatureMap:
    """Directions of the features, ready for any number of queries and keys (`favor_feature_map`).

    Args:
        directions: `[heads, features, head_dim]`, with statistics `[batch or 1, heads, features, head_dim]`.
        own: `[.., features]`: what a feature adds to the log-weight of every token.
        statistics: FAVOR#'s constants, in at least float32; `None` is FAVOR+.
        log_count: Logarithm of the number of features.
        root: The square root of `scaling` where tokens come as they are; 1 where they are scaled. Only for FAVOR+.
    """

    directions: Tensor
    own: Tensor
    statistics: FavorStatistics | None
    log_count: float
    root: float = 1.0

    def query(self, x: Tensor) -> LinearSlotWeights:
        """Log-weights `a[t, j]` of queries `[batch, heads, tokens, head_dim]`."""
        directions = self.directions.to(x.dtype)
        if self.statistics is None:
            return LinearSlotWeights(
                x, half_norm(x).unsqueeze(-1) * -(self.root**2) - self.log_count, directions, self.own
            )
        wide = x.to(self.own.dtype)
        x_mean, y_mean = self.statistics.query_mean, self.statistics.key_mean
        extra = (wide * y_mean).sum(-1, keepdim=True) - (x_mean * y_mean).sum(-1, keepdim=True)
        x = self.statistics.transform_query(wide).to(x.dtype)
        return LinearSlotWeights(x, extra - half_norm(x).unsqueeze(-1) - self.log_count, directions, self.own)

    def key(self, y: Tensor) -> LinearSlotWeights:
        """Log-weights `c[j, n]` of keys `[batch, heads, tokens, head_dim]`."""
        directions = self.directions.to(y.dtype)
        if self.statistics is None:
            return LinearSlotWeights(y, half_norm(y).unsqueeze(-1) * -(self.root**2), directions, self.own)
        wide = y.to(self.own.dtype)
        extra = (wide * self.statistics.query_mean).sum(-1, keepdim=True)
        y = self.statistics.transform_key(wide).to(y.dtype)
        return LinearSlotWeights(y, extra - half_norm(y).unsqueeze(-1), directions, self.own)


def favor_feature_map(
    x: Tensor, projection: Tensor, statistics: FavorStatistics | None = None, *, root: float = 1.0
) -> FavorFeatureMap:
    """The basis for queries and keys like `x` `[batch, heads, tokens, head_dim]`.

    Args:
        projection: `[heads, features, head_dim]` or `[features, head_dim]`.
        root: Square root of `scaling` for tokens that are not scaled: a factor of the few directions instead of all
            tokens, which saves reading and writing these. Without statistics.
    Raises: InputError if the statistics are those of other heads.
    """
    heads = None if statistics is None else statistics.query_mean.shape[1]
    if statistics is not None and (heads not in (1, x.shape[1]) or statistics.query_mean.shape[-1] != x.shape[-1]):
        raise InputError(
            f"statistics must be those of {x.shape[1]} heads of dimension {x.shape[-1]}; got means"
            f" {tuple(statistics.query_mean.shape)}."
        )
    wide, log_count = torch.promote_types(x.dtype, torch.float32), math.log(projection.shape[-2])
    projection = projection.to(wide)
    if statistics is None:
        own = torch.zeros_like(projection[..., 0])
        return FavorFeatureMap(projection if root == 1 else projection * root, own, None, log_count, root)
    statistics = FavorStatistics(*(s.to(device=x.device, dtype=wide) for s in statistics))
    shape = statistics.shape
    stretch = (1 - 4 * shape).sqrt()
    # w'Aw + log det(I - 4A) / 4, once for the query's factor and once for the key's.
    own = (projection.square() * shape).sum(-1) + stretch.log().sum(-1) / 2
    return FavorFeatureMap(projection * stretch, own, statistics, log_count)


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
    x: Tensor, y: Tensor, projection: Tensor, statistics: FavorStatistics | None = None, *, root: float = 1.0
) -> tuple[LinearSlotWeights, LinearSlotWeights]:
    """The same as `favor_log_features`, as dot products of tokens and slots. `root` as in `favor_feature_map`."""
    basis = favor_feature_map(x, projection, statistics, root=root)
    return basis.query(x), basis.key(y)
