"""The feature maps of FAVOR+ and FAVOR#: what of the log-features depends on the layer, and what on the token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.half_norm import length_bias
from ..linear_weights import LinearSlotWeights, TokenRule
from .statistics import FavorStatistics, transformed


@dataclass(frozen=True)
class FavorFeatureMap:
    """Directions of the features, ready for any number of queries and keys (`favor_feature_map`).

    Args:
        directions: `[heads, features, head_dim]`, with statistics `[batch or 1, heads, features, head_dim]`.
        feature_bias: `[.., features]`: what a feature adds to the log-weight of every token; `None` for 0.
        statistics: FAVOR#'s constants, in at least float32; `None` is FAVOR+.
        log_count: Logarithm of the number of features.
        root: The square root of `scaling` where tokens come as they are; 1 where they are scaled. Only for FAVOR+.
    """

    directions: Tensor
    feature_bias: Tensor | None
    statistics: FavorStatistics | None
    log_count: float
    root: float = 1.0

    def query_weights(self, query: Tensor) -> LinearSlotWeights:
        """Log-weights `a[t, j]` of queries `[batch, heads, tokens, head_dim]`."""
        directions, statistics = self.directions.to(query.dtype), self.statistics
        if statistics is None:
            rule = TokenRule(1.0, -self.log_count, root=self.root)
            return LinearSlotWeights(query, None, directions, self.feature_bias, rule=rule)
        wide = query.to(torch.promote_types(query.dtype, torch.float32))
        centred = wide - statistics.query_mean.to(wide)
        moved, bias = in_coordinates(
            centred, centred, statistics.key_mean.to(wide), statistics.query_transform.to(wide), query.dtype
        )
        return LinearSlotWeights(moved, bias - self.log_count, directions, self.feature_bias)

    def key_weights(self, key: Tensor) -> LinearSlotWeights:
        """Log-weights `c[j, n]` of keys `[batch, heads, tokens, head_dim]`."""
        directions, statistics = self.directions.to(key.dtype), self.statistics
        if statistics is None:
            return LinearSlotWeights(key, None, directions, self.feature_bias, rule=TokenRule(1.0, root=self.root))
        wide = key.to(torch.promote_types(key.dtype, torch.float32))
        centred = wide - statistics.key_mean.to(wide)
        moved, bias = in_coordinates(
            wide, centred, statistics.query_mean.to(wide), statistics.key_transform.to(wide), key.dtype
        )
        return LinearSlotWeights(moved, bias, directions, self.feature_bias)


def in_coordinates(
    z: Tensor, centred: Tensor, other_mean: Tensor, transform: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Centred tokens in the coordinates of the features, and their bias `z . other_mean - |moved|^2 / 2`."""
    moved = transformed(centred, transform).to(dtype)
    return moved, torch.linalg.vecdot(z, other_mean).unsqueeze(-1) + length_bias(moved)


def favor_feature_map(
    query: Tensor, projection: Tensor, statistics: FavorStatistics | None = None, *, root: float = 1.0
) -> FavorFeatureMap:
    """The feature map for queries and keys like `query` `[batch, heads, tokens, head_dim]`.

    Args:
        projection: `[heads, features, head_dim]` or `[features, head_dim]`.
        root: Square root of `scaling` for tokens that are not scaled: it becomes a factor of the few directions
            instead of all tokens, which saves reading and writing these. Without statistics.
    Raises: InputError if the statistics are those of other heads.
    """
    wide, log_count = torch.promote_types(query.dtype, torch.float32), math.log(projection.shape[-2])
    projection = projection.to(wide)
    if statistics is None:
        return FavorFeatureMap(projection, None, None, log_count, root)
    if statistics.query_mean.shape[1] not in (1, query.shape[1]) or statistics.query_mean.shape[-1] != query.shape[-1]:
        raise InputError(
            f"statistics must be those of {query.shape[1]} heads of dimension {query.shape[-1]}; got means"
            f" {tuple(statistics.query_mean.shape)}."
        )
    if statistics.shape.dtype != wide or statistics.shape.device != query.device:
        statistics = statistics.to(dtype=wide, device=query.device)
    stretch = (1 - 4 * statistics.shape).sqrt()
    # w'Aw + log det(I - 4A) / 4, once for the query's factor and once for the key's.
    bias = (projection.square() @ statistics.shape.mT).squeeze(-1) + stretch.log().sum(-1) / 2
    return FavorFeatureMap(projection * stretch, bias, statistics, log_count)


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
    feature_map = favor_feature_map(x, projection, statistics)
    return feature_map.query_weights(x).dense(), feature_map.key_weights(y).dense()
