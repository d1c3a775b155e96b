"""Causal FAVOR+, FAVOR# and generalised kernel attention token by token: the state of their features."""

from __future__ import annotations

from torch import Tensor

from ..noise import SlotDropout
from ..precision import compute_dtype
from ..recurrent.slots import FeatureMap, SlotRecurrence
from ..slot_attention import SlotOptions
from .features import favor_feature_map
from .generalized import GeneralizedFeatureMap
from .statistics import FavorStatistics


def favor_recurrence(
    query: Tensor,
    projection: Tensor,
    *,
    scaling: float,
    statistics: FavorStatistics | None = None,
    kernel: str = "softmax",
    kernel_epsilon: float = 1e-3,
    window_size: int = 0,
    overlap_window: bool = False,
    chunk_size: int | None = None,
    slot_dropout: float | SlotDropout = 0.0,
) -> SlotRecurrence:
    """The recurrent form of `favor_attention(..., is_causal=True)` or, with another `kernel` than "softmax", of
    `generalized_attention`, with the same options.

    Args:
        query: Like those to come, in heads, dimension, device and dtype.
    """
    options = SlotOptions(True, window_size, overlap_window, chunk_size=chunk_size, dropout=slot_dropout)
    num_features = projection.shape[-2]
    if kernel != "softmax":
        generalized = GeneralizedFeatureMap(projection, kernel, kernel_epsilon)
        return SlotRecurrence(generalized, num_features, scaling, options)
    feature_map: FeatureMap = favor_feature_map(
        query[:, :, :0].to(compute_dtype(query, query, query)), projection, statistics
    )
    return SlotRecurrence(feature_map, num_features, scaling, options, in_half=("cpu", "cuda"))
