"""LARA's landmarks: mean queries and keys of parts of the sequence or image, mapped and mixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ..padding import Tokens
from ..proposal_map import ProposalMap, ResidualMap
from ..softmax import mask_logits, softmax_with_lse
from .parts import Parts, parts_of

MIXINGS = ("none", "key", "key_value")
MAP_STAGES = ("mean", "tokens")
_NORM_EPSILON = 1e-4  # part of the published definition of mixing with values


@dataclass(frozen=True)
class Landmarks:
    """Where LARA's proposals are: at the sum of a landmark's mean query and mean key.

    mean: Their sum, `[batch, heads, landmarks, head_dim]`, in scaled coordinates. query_mean: Its part of the queries,
        of tokens that are scaled; `None` of others.
    parts: The tokens that a landmark stands for.
    used: `[batch or 1, 1, 1, landmarks]`, False for a landmark without tokens; `None` if all have some.
    """

    mean: Tensor
    query_mean: Tensor | None
    parts: Parts
    used: Tensor | None


def find_landmarks(
    tokens: Tokens,
    num_landmarks: int,
    scaling: float,
    query_map: ProposalMap | None,
    key_map: ProposalMap | None,
    map_stage: str,
    mixing: str,
) -> Landmarks:
    """Average, map and mix; the options are those of `lara_attention`."""
    if map_stage not in MAP_STAGES:
        raise InputError(f"map_stage must be one of {list(MAP_STAGES)}; got {map_stage!r}.")
    if mixing not in MIXINGS:
        raise InputError(f"mixing must be one of {list(MIXINGS)}; got {mixing!r}.")
    parts = parts_of(tokens, num_landmarks)
    if tokens.root != 1:
        if query_map is None and key_map is None and mixing == "none":
            return Landmarks(parts.mean(tokens.query + tokens.key) * tokens.root, None, parts, parts.used)
        tokens = tokens.scaled()
    # Maps live in the coordinates of the arguments; a residual one is the same in all that differ by a factor.
    root = scaling**0.5

    def mean_of(z: Tensor, mapping: ProposalMap | None) -> Tensor:
        if mapping is None:
            return parts.mean(z)
        on_tokens = map_stage == "tokens"  # no landmark has a padded token
        z = z if on_tokens else parts.mean(z)
        z = mapping(z) if isinstance(mapping, ResidualMap) else mapping(z / root) * root
        return parts.mean(z) if on_tokens else z

    query_mean, key_mean = mean_of(tokens.query, query_map), mean_of(tokens.key, key_map)
    used = parts.used
    if mixing != "none":
        value_mean = mean_of(tokens.value, None) if mixing == "key_value" else None
        key_mean = mix_landmarks(key_mean, value_mean, used)
    return Landmarks(query_mean + key_mean, query_mean, parts, used)


def mix_landmarks(key_mean: Tensor, value_mean: Tensor | None, used: Tensor | None) -> Tensor:
    """Every key landmark replaced by its softmax average over all; with `value_mean` large values count more."""
    logits = key_mean @ key_mean.transpose(-1, -2)
    if value_mean is not None:
        logits = logits + (torch.linalg.vector_norm(value_mean, dim=-1) + _NORM_EPSILON).log().unsqueeze(-2)
    return softmax_with_lse(mask_logits(logits, used), key_mean).output
