"""LARA's landmarks: mean queries and keys of parts of the sequence or image, mapped and mixed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ..inputs import ProposalMap
from ..layout import gather_tokens, masked_mean
from ..padding import Tokens
from ..softmax import mask_logits, softmax_with_lse

MIXINGS = ("none", "key", "key_value")
MAP_STAGES = ("mean", "tokens")
_NORM_EPSILON = 1e-4  # part of the published definition of mixing with values


@dataclass(frozen=True)
class Landmarks:
    """Where LARA's proposals are: at the sum of a landmark's mean query and mean key.

    query_mean, key_mean: `[batch, heads, landmarks, head_dim]`, in scaled coordinates.
    index: `[batch or 1, landmarks, members]` token numbers, -1 padded. member: The same, True for a real token.
    used: `[batch or 1, 1, 1, landmarks]`, False for a landmark without members.
    """

    query_mean: Tensor
    key_mean: Tensor
    index: Tensor
    member: Tensor
    used: Tensor


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
    longest = tokens.key.shape[2]
    if tokens.grid is None:
        index = segment_index(tokens.lengths, min(num_landmarks, longest), longest)
    else:
        index = grid_bins(tokens.grid, math.isqrt(num_landmarks), tokens.key.device)
    member = index >= 0
    if tokens.valid is not None:
        member = member & (index < tokens.lengths[:, None, None])
    used = member.any(-1)[:, None, None, :]
    root = scaling**0.5  # maps live in the coordinates of the arguments

    def mean_of(z: Tensor, mapping: ProposalMap | None) -> Tensor:
        on_tokens = mapping is not None and map_stage == "tokens"
        if mapping is not None and on_tokens:
            z = mapping(z / root) * root  # no landmark has a padded token
        mean = masked_mean(gather_tokens(z, index), member)
        return mean if mapping is None or on_tokens else mapping(mean / root) * root

    query_mean, key_mean = mean_of(tokens.query, query_map), mean_of(tokens.key, key_map)
    if mixing != "none":
        value_mean = mean_of(tokens.value, None) if mixing == "key_value" else None
        key_mean = mix_landmarks(key_mean, value_mean, used)
    return Landmarks(query_mean, key_mean, index, member, used)


def mix_landmarks(key_mean: Tensor, value_mean: Tensor | None, used: Tensor) -> Tensor:
    """Every key landmark replaced by its softmax average over all; with `value_mean` large values count more."""
    logits = key_mean @ key_mean.transpose(-1, -2)
    if value_mean is not None:
        logits = logits + (torch.linalg.vector_norm(value_mean, dim=-1) + _NORM_EPSILON).log().unsqueeze(-2)
    return softmax_with_lse(mask_logits(logits, used), key_mean).output


def segment_index(lengths: Tensor, num_segments: int, longest: int) -> Tensor:
    """Cut each row's first `lengths[b]` tokens into `num_segments` consecutive segments of nearly equal length.

    A row with at most `num_segments` tokens has one token per segment and the rest of its segments empty. Otherwise,
    with `S = floor(length / num_segments)`, the first segments have `S` tokens and the last `length - S *
    num_segments` have `S + 1` (the landmarks of LARA; official code, `HKUNLP/efficient-attention`).

    Args:
        lengths: `[batch]` integers. longest: An upper bound of the lengths that is known without reading them.
    Returns: `[batch, num_segments, members]` token numbers, -1 where a segment has no such member.
    """
    device = lengths.device
    segment = torch.arange(num_segments, device=device)
    members = torch.arange(max(1, -(-longest // num_segments)), device=device)
    short = lengths[:, None] // num_segments
    num_long = lengths[:, None] - short * num_segments
    first_long = num_segments - num_long
    few = lengths[:, None] <= num_segments
    start = torch.where(few, segment, segment * short + (segment - first_long).clamp_min(0))
    size = torch.where(few, (segment < lengths[:, None]).long(), short + (segment >= first_long).long())
    index = start[..., None] + members
    return torch.where(members < size[..., None], index, -1)


def grid_bins(grid: tuple[int, int], bins: int, device: torch.device) -> Tensor:
    """Adaptive average pooling as an index: `bins x bins` rectangles that cover the grid and may share cells.

    Bin `(r, c)` holds rows `floor(r H / bins) .. ceil((r + 1) H / bins) - 1` and columns likewise.
    Returns: `[1, bins * bins, members]`, -1 padded.
    """
    height, width = grid
    cells = []
    for r in range(bins):
        rows = range(r * height // bins, -(-(r + 1) * height // bins))
        for c in range(bins):
            columns = range(c * width // bins, -(-(c + 1) * width // bins))
            cells.append([row * width + column for row in rows for column in columns])
    longest = max(len(cell) for cell in cells)
    return torch.tensor([[*cell, *[-1] * (longest - len(cell))] for cell in cells], device=device).unsqueeze(0)
