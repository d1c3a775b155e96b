"""The attention functions on their own, for people with their own model.

All take `query`, `key`, `value` of shape `[batch, heads, tokens, head_dim]`, a `key_mask` `[batch, keys]` that is True
where a token is real, and return `[batch, heads, queries, head_dim]` in the dtype of `query`. They compute in float32
at least, hold no state, and are differentiable. Padding never matters: a row gives what it would give without it.

Queries and keys of equal number count as the same tokens: the kinds then give 0 at masked queries (the references,
`softmax_attention` and `randomized_attention`, do not). For cross-attention pass `is_cross=True` to `favor_attention`.
"""

from __future__ import annotations

from .ops.eva import eva_attention
from .ops.exact import softmax_attention
from .ops.favor import FavorStatistics, favor_attention, favor_log_features, favor_statistics
from .ops.lara import lara_attention
from .ops.random_features import derive_seed, draw_projection
from .ops.randomized import randomized_attention

__all__ = [
    "FavorStatistics",
    "derive_seed",
    "draw_projection",
    "eva_attention",
    "favor_attention",
    "favor_log_features",
    "favor_statistics",
    "lara_attention",
    "randomized_attention",
    "softmax_attention",
]
