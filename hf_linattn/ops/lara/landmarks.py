"""LARA's landmarks: mean queries and keys of parts of the sequence or image, mapped and mixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ..layout import gather_tokens, grid_bins, masked_mean, segment_index
from ..slots import mask_logits, softmax_with_lse
from ..tokens import Tokens

MIXINGS = ("none", "key", "key_value")
MAP_STAGES = ("mean", "tokens")
_NORM_EPSILON = 1e-4  # part of the published definition of mixing with values

LandmarkMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Landmarks:
    """`query_mean`, `key_mean` are `[batch, heads, landmarks, head_dim]` in scaled coordinates.

    index: `[batch or 1, landmarks, members]` token numbers, -1 padded. used: `[batch or 1, 1, 1, landmarks]`, False
    for a landmark without members.
    """

    query_mean: Tensor
    key_mean: Tensor
    index: Tensor
    used: Tensor


def landmark_index(tokens: Tokens, num_landmarks: int) -> Tensor:
    """Members of each landmark, `[batch or 1, landmarks, members]`: segments of a sequence, bins of a grid."""
    if tokens.grid is not None:
        return grid_bins(tokens.grid, math.isqrt(num_landmarks), tokens.y.device)
    longest = tokens.y.shape[2]
    return segment_index(tokens.lengths, min(num_landmarks, longest), longest)


def real_members(tokens: Tokens, index: Tensor) -> Tensor:
    """Where `index` names a real token of the row."""
    return (index >= 0) if tokens.valid is None else (index >= 0) & (index < tokens.lengths[:, None, None])


def find_landmarks(
    tokens: Tokens,
    num_landmarks: int,
    *,
    scaling: float,
    query_map: LandmarkMap | None = None,
    key_map: LandmarkMap | None = None,
    map_stage: str = "mean",
    mixing: str = "none",
) -> Landmarks:
    """Average, map and mix; the options are those of `lara_attention`."""
    if map_stage not in MAP_STAGES:
        raise InputError(f"map_stage must be one of {list(MAP_STAGES)}; got {map_stage!r}.")
    if mixing not in MIXINGS:
        raise InputError(f"mixing must be one of {list(MIXINGS)}; got {mixing!r}.")
    index = landmark_index(tokens, num_landmarks)
    member = real_members(tokens, index)
    used = member.any(-1)[:, None, None, :]

    def mean(z: Tensor) -> Tensor:
        return masked_mean(gather_tokens(z, index), member)

    def landmark(z: Tensor, mapping: LandmarkMap | None) -> Tensor:
        if mapping is None:
            return mean(z)
        root = scaling**0.5  # maps live in the coordinates of the arguments
        if map_stage == "mean":
            return mapping(mean(z) / root) * root
        return mean(mapping(z / root) * root)  # no landmark has a padded token

    query_mean, key_mean = landmark(tokens.x, query_map), landmark(tokens.y, key_map)
    if mixing != "none":
        value_mean = mean(tokens.value) if mixing == "key_value" else None
        key_mean = mix_landmarks(key_mean, value_mean, used)
    return Landmarks(query_mean, key_mean, index, used)


def mix_landmarks(key_mean: Tensor, value_mean: Tensor | None, used: Tensor) -> Tensor:
    """Every key landmark replaced by its softmax average over all; with `value_mean` large values count more."""
    logits = key_mean @ key_mean.transpose(-1, -2)
    if value_mean is not None:
        logits = logits + (torch.linalg.vector_norm(value_mean, dim=-1) + _NORM_EPSILON).log().unsqueeze(-2)
    return softmax_with_lse(mask_logits(logits, used), key_mean).output
