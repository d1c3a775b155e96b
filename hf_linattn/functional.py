"""The attention functions on their own, for people with their own model. `docs/functional.md` is the guide.

All take `query`, `key`, `value` of shape `[batch, heads, tokens, head_dim]`, a `key_mask` `[batch, keys]` that is True
where a token is real, and return `[batch, heads, queries, head_dim]` in the dtype of `query`. They compute in float32
at least, hold no state, and are differentiable. Padding never matters: a row gives what it would give without it.

Queries and keys of equal number count as the same tokens: the kinds then give 0 at masked queries (the references,
`softmax_attention` and `randomized_attention`, do not). For cross-attention pass `is_cross=True` to `favor_attention`.
"""

from __future__ import annotations

from .kernels.backends import current_backend, set_backend, use_backend
from .ops.eva.attention import eva_attention
from .ops.eva.relative_position import t5_bucket, t5_index, t5_sizes, table_index, table_size
from .ops.favor.attention import favor_attention
from .ops.favor.features import favor_log_features
from .ops.favor.fit import optimal_shape
from .ops.favor.generalized import generalized_attention
from .ops.favor.random_features import derive_seed, draw_projection
from .ops.favor.statistics import (
    FavorMoments,
    FavorStatistics,
    favor_statistics,
    neutral_statistics,
)
from .ops.favor.variance import (
    kernel_relative_variance,
    log_relative_moment,
    mean_log_second_moment,
    predicted_output_error,
)
from .ops.lara.attention import lara_attention
from .ops.lara.kmeans import kmeans
from .ops.lara.proposals import CalibratedProposals, sample_proposals
from .ops.lara.randomized import randomized_attention
from .ops.noise import RowNoise, SlotDropout
from .ops.softmax import softmax_attention

__all__ = [
    "CalibratedProposals",
    "FavorMoments",
    "FavorStatistics",
    "RowNoise",
    "SlotDropout",
    "current_backend",
    "derive_seed",
    "draw_projection",
    "eva_attention",
    "favor_attention",
    "favor_log_features",
    "favor_statistics",
    "generalized_attention",
    "kernel_relative_variance",
    "kmeans",
    "lara_attention",
    "log_relative_moment",
    "mean_log_second_moment",
    "neutral_statistics",
    "optimal_shape",
    "predicted_output_error",
    "randomized_attention",
    "sample_proposals",
    "set_backend",
    "softmax_attention",
    "t5_bucket",
    "t5_index",
    "t5_sizes",
    "table_index",
    "table_size",
    "use_backend",
]
