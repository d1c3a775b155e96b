"""The convolution of the values that a layer with learned maps may add to its output (`ops/value_convolution.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..ops.ablation import ABLATED, SLOT_SHARE, SLOTS_ALONE, current_ablations
from ..ops.value_convolution import value_convolution
from .config import AttentionConfig
from .contract import AttentionInputs

VALUE_CONVOLUTION = "value_convolution_weight"


def with_value_convolution(
    output: Tensor, config: AttentionConfig, state: Mapping[str, Tensor], inputs: AttentionInputs
) -> Tensor:
    """The output of attention, with the convolution of the values added if the layer has one."""
    if not config.value_convolution:
        return output
    if ABLATED and current_ablations() & {SLOTS_ALONE, SLOT_SHARE}:  # it goes beside the slots
        return output
    count = config.num_global_tokens or 0
    mixed = value_convolution(inputs.value, state[VALUE_CONVOLUTION], grid=inputs.grid, num_global_tokens=count)
    return (output + mixed).to(output.dtype)
