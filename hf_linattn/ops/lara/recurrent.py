"""Causal LARA token by token: the state of the samples of its calibrated proposals."""

from __future__ import annotations

from torch import Tensor

from ..noise import SlotDropout
from ..precision import compute_dtype
from ..recurrent.slots import SlotRecurrence
from ..slot_attention import SlotOptions
from .features import proposal_feature_map
from .proposals import CalibratedProposals


def lara_recurrence(
    query: Tensor,
    proposals: CalibratedProposals,
    *,
    scaling: float,
    offset: Tensor | None = None,
    window_size: int = 0,
    overlap_window: bool = False,
    chunk_size: int | None = None,
    slot_dropout: float | SlotDropout = 0.0,
) -> SlotRecurrence:
    """The recurrent form of `lara_attention(..., is_causal=True)` with calibrated proposals and the same options.

    Args:
        query: Like those to come, in heads, dimension, device and dtype.
    """
    if offset is not None and offset.ndim == 1:
        offset = offset[None, :, None, None]
    like = query[:, :, :0].to(compute_dtype(query, query, query))
    feature_map = proposal_feature_map(like, proposals, offset)
    options = SlotOptions(True, window_size, overlap_window, chunk_size=chunk_size, dropout=slot_dropout)
    return SlotRecurrence(feature_map, feature_map.samples.shape[-2], scaling, options)
