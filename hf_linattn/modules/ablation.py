"""A layer of which a part is taken away (`ops/ablation.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..ops.ablation import SLOTS_ALONE, ablate
from .contract import AttentionInputs
from .recorded import is_traced
from .registry import get_kind


def ablated_output(layer: Any, inputs: AttentionInputs) -> Tensor:
    """What a layer computes without the part that `layer.ablation` names.

    Raises: UnsupportedError where the call is compiled or recorded, or the kind does not ask what is taken away.
    """
    if torch.compiler.is_compiling() or is_traced():
        raise UnsupportedError(
            f"Within ablated(model, {layer.ablation!r}) a model is not compiled or recorded. Call the model itself,"
            " not what torch.compile, torch.export or torch.jit.trace makes of it."
        )
    assert layer.ablation is not None
    config = layer.config
    if layer.ablation == SLOTS_ALONE and not get_kind(layer.kind).needs_window:
        # The same layer, converted with nothing exact. Slots have no place on a grid.
        nothing = {"window_size": 0, "overlap_window": False, "num_global_tokens": 0}
        if config.num_heavy_keys:
            nothing["num_heavy_keys"] = 0
        config, inputs = config.replace(**nothing), replace(inputs, grid=None)
    if layer.ablation == SLOTS_ALONE and config.exact_below:
        config = config.replace(exact_below=0)
    with ablate(layer.ablation) as asked:
        output = layer.compute_or_record(config, layer.tensors(), inputs)
    if not asked.was_followed:
        raise UnsupportedError(
            f"The kind {layer.kind!r} computes attention in a way of its own, in which it is unknown what goes through"
            " slots: nothing can be taken away from it."
        )
    return output
