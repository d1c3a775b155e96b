"""Bidirectional attention through slots over a sequence whose tokens are spread over processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..modules.base import LinearAttention
from ..modules.contract import AttentionInputs
from .collectives import SequenceGroup


def attend_slots(layer: LinearAttention[Any], inputs: AttentionInputs, group: SequenceGroup) -> Tensor:
    """`attend_across` for a bidirectional layer of FAVOR or LARA."""
    raise NotImplementedError
