r"""Bidirectional attention through slots over a sequence whose tokens are spread over processes.

A slot's value and log-sum-exp over all keys are those over the keys of each process, merged. Without a window they are
all that a query reads, and an all-reduce of `M (head_dim + 1)` numbers per head is all that is exchanged. Beside a
window a query reads the keys of its own part as ever (exactly in the window, through slots outside), and the slots of
the other parts, gathered: what it reads is merged by the log-sum-exps, which is exact because reading is linear in the
weights of the slots.

A window that overlaps the border of two parts sees tokens of both: parts take in one block of each neighbour, and read
slots without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UnsupportedError
from ..kernels.attention_state import AttentionState, merge_states
from ..modules.base import LinearAttention
from ..modules.contract import AttentionInputs
from ..modules.kinds.favor_sharp import FavorSharpAttention
from ..ops.favor.statistics import DENSE_VARIANTS, FavorMoments, FavorStatistics, token_moments
from ..ops.padding import Tokens
from ..ops.recurrent.slots import SlotRecurrence
from ..ops.slot_attention import SlotOptions, exact_attention
from ..ops.slot_weights import FeatureMap, SlotWeights
from .collectives import SequenceGroup
from .states import from_left, from_right, merge_over, only_if, states_elsewhere
from .tokens import with_mask


def slot_reader(
    layer: LinearAttention[Any], inputs: AttentionInputs, group: SequenceGroup
) -> tuple[Callable[[Tokens], AttentionState], tuple[str, ...]]:
    """For a layer of FAVOR or LARA: what the queries of a part read; and where they are taken in half precision."""
    maps = _maps(layer, inputs, group)
    options, beside_exact = maps.options._replace(is_causal=False), bool(layer.config.num_global_tokens)

    def read(part: Tokens) -> AttentionState:
        if options.window_size:
            return _beside_windows(maps.feature_map, part, options, group)
        return _slots_alone(maps.feature_map, part, group, beside_exact=beside_exact)

    return read, maps.in_half


def _maps(layer: LinearAttention[Any], inputs: AttentionInputs, group: SequenceGroup) -> SlotRecurrence:
    """The layer's feature map and options: causal or not, they are those of its recurrent form."""
    if isinstance(layer, FavorSharpAttention) and layer.config.statistics == "row":
        return layer.recurrence_of_rows(inputs.query, _row_statistics(layer, inputs, group), scaling=inputs.scaling)
    maps = layer.recurrence(inputs.query, scaling=inputs.scaling)
    if not isinstance(maps, SlotRecurrence):
        raise UnsupportedError(f"{type(layer).__name__} reads no slots, and shares no sequences when bidirectional.")
    return maps


@torch.no_grad()
def _row_statistics(layer: FavorSharpAttention, inputs: AttentionInputs, group: SequenceGroup) -> FavorStatistics:
    """`favor_statistics` of whole rows: the moments of all parts, merged in their order."""
    config, dense = layer.config, layer.config.variant in DENSE_VARIANTS
    own = token_moments(inputs.query, inputs.key, inputs.key_mask, dense=dense).scaled(inputs.scaling).tensors()
    parts = group.gather(torch.cat([z.flatten() for z in own.values()])).unbind(0)
    sizes = [z.numel() for z in own.values()]
    moments = []
    for part in parts:
        pieces = zip(own.items(), part.split(sizes), strict=True)
        moments.append(FavorMoments(**{name: piece.view_as(z) for (name, z), piece in pieces}))
    return sum(moments[1:], moments[0]).statistics(config.variant, config.centring)


def _slots_alone(feature_map: FeatureMap, part: Tokens, group: SequenceGroup, *, beside_exact: bool) -> AttentionState:
    """Every query reads the slots of all keys."""
    key_weights = feature_map.key_weights(part.key).masked(part.visible)
    if not beside_exact:
        key_weights = key_weights.without_common_factor(group.maximum)
    query_weights = feature_map.query_weights(part.query)
    return query_weights.add_token_bias(query_weights.read(merge_over(key_weights.summarise(part.value), group)))


def _beside_windows(
    feature_map: FeatureMap, part: Tokens, options: SlotOptions, group: SequenceGroup
) -> AttentionState:
    """Windows and all slots under one softmax."""
    reach = options.window_size if options.overlap_window else 0
    around = _with_neighbours(part, reach, group) if reach else part
    query_weights, key_weights = feature_map.query_weights(around.query), feature_map.key_weights(around.key)
    near = exact_attention(around, options).with_slots(query_weights, key_weights)
    if reach:
        stop = reach + part.key.shape[2]
        near = AttentionState(near.output[:, :, reach:stop], near.lse[:, :, reach:stop])
        query_weights = query_weights.map_tokens(lambda z: z[:, :, reach:stop])
        key_weights = key_weights.map_tokens(lambda z: z[:, :, reach:stop])
    slots = _slots_elsewhere(key_weights.masked(part.visible), part.value, reach, group)
    far = query_weights.add_token_bias(query_weights.read(slots))
    return merge_states([near, far])


def _with_neighbours(part: Tokens, reach: int, group: SequenceGroup) -> Tokens:
    """This part between the keys of `reach` tokens of each neighbour. The queries of these are 0."""

    def around(z: Tensor) -> Tensor:
        return torch.cat([group.from_left(z[:, :, -reach:]), z, group.from_right(z[:, :, :reach])], 2)

    sizes = part.key.shape[-1], part.value.shape[-1]
    key, value = around(torch.cat([part.key, part.value], -1)).split(sizes, -1)
    real = torch.ones_like(part.key[:, :1, :, :1]) if part.visible is None else part.visible
    real = around(real.to(torch.uint8)) > 0  # also False beyond the ends of the sequence
    tokens = replace(part, query=F.pad(part.query, (0, 0, reach, reach)), key=key, value=value)
    return with_mask(tokens, real.flatten(1))


def _slots_elsewhere(key_weights: SlotWeights, value: Tensor, reach: int, group: SequenceGroup) -> AttentionState:
    """What slots have read of the other parts, without `reach` tokens of each neighbour."""
    length = value.shape[2]

    def read(start: int, stop: int) -> AttentionState:
        return key_weights.map_tokens(lambda z: z[:, :, start:stop]).summarise(value[:, :, start:stop])

    if not reach:
        return merge_states(states_elsewhere(read(0, length), group))
    if length == reach:
        whole = read(0, length)
        but_first = but_last = only_if(False, whole)
    else:
        first, last = read(0, reach), read(length - reach, length)
        middle = [read(reach, length - reach)] if length > 2 * reach else []
        but_first, but_last = merge_states([*middle, last]), merge_states([first, *middle])
        whole = merge_states([first, but_first])
    beside = from_left(but_last, group), from_right(but_first, group)
    return merge_states([*states_elsewhere(whole, group, gap=2), *beside])
