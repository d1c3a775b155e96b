"""Bidirectional attention over a sequence whose tokens are spread over processes: what its kinds have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..modules.base import LinearAttention
from ..modules.contract import AttentionInputs
from ..modules.kinds.eva import EvaAttention
from ..ops.precision import compute_dtype
from .collectives import SequenceGroup
from .eva import eva_reader
from .global_tokens import beside_global_tokens
from .slots import slot_reader
from .tokens import part_tokens


def attend_bidirectional(layer: LinearAttention[Any], inputs: AttentionInputs, group: SequenceGroup) -> Tensor:
    """`attend_across` for a bidirectional layer."""
    if isinstance(layer, EvaAttention):
        read, in_half = eva_reader(layer, inputs, group)
    else:
        read, in_half = slot_reader(layer, inputs, group)
    part = part_tokens(inputs, compute_dtype(inputs.query, inputs.key, inputs.value, in_half))
    count = layer.config.num_global_tokens
    output = beside_global_tokens(part, count, group, read) if count else read(part).output
    output = output if part.visible is None else output.masked_fill(~part.visible, 0.0)
    return output.to(inputs.query.dtype)
