"""The place in training, told to the layers that draw random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..integrations.layers import active_layers
from ..integrations.wrappers import module_of
from ..modules.base import LinearAttention
from ..modules.redraw import check_step
from ..modules.training_place import LARGEST_ROW, TrainingPlace, step_key


def key_noise(
    model: nn.Module, step: int | None, first_row: int = 0, *, rows: int | None = None, seed: int = 0
) -> int:
    """Make the random numbers of the next forward pass those of its rows, not those of the process.

    The noise of LARA and EVA and the dropout of slots are then a function of (`seed`, the layer's seed, layer, `step`,
    row of the global batch), so that a run is the same on any number of processes. Call it before every forward pass
    of training, with the place of its batch::

        for step, batches in enumerate(...):
            for number, batch in enumerate(batches):  # of gradient accumulation
                first_row = (number * world_size + rank) * batch_size
                key_noise(model, step, first_row, rows=batch_size, seed=seed)
                model(**batch).loss.backward()
            optimizer.step()
        key_noise(model, None)

    Processes that share sequences or heads have the same rows, so `rank` and `world_size` count replicas there. All
    forward passes until the next call have the same numbers, also those that activation checkpointing does again.
    Without a call torch's generator draws a key in every pass. `LinAttnCallback` makes these calls in a `Trainer`.

    Args:
        model: A converted model, as it is or wrapped. In native mode torch's generator draws.
        step: Optimizer steps taken so far. `None` ends it: torch's generator draws again.
        first_row: The number of the batch's first row in the global batch, that is among the rows of all processes and
            all micro-batches of this step; the others follow it.
        rows: Rows of a batch. Needed where attention has more of them, such as the answers of a multiple-choice
            question, which then share the number of their row, and have numbers of their own besides.
        seed: Of the run.
    Returns: The number of layers that draw random numbers.
    Raises: InputError for a step, row, number of rows or seed that cannot be.
    """
    model = module_of(model, "key_noise")
    if step is None:
        for module in model.modules():
            if isinstance(module, LinearAttention):
                module.training_place = None
        return 0
    check_step(step)
    for name, value, least in (("first_row", first_row, 0), ("rows", rows, 1), ("seed", seed, 0)):
        may_be_none = name == "rows" and value is None
        if not may_be_none and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name} must be an integer >= {least}; got {value!r}.")
    if first_row + (rows or 1) > LARGEST_ROW:
        raise InputError(f"first_row must be below 2**31; got {first_row!r}.")
    layers = [layer for layer in active_layers(model) if layer.config.is_random]
    for layer in layers:
        device = _device(layer, model)
        if layer.training_place is None or layer.training_place.device != device:
            layer.training_place = TrainingPlace(device)
        key = step_key(seed, layer.config.seed, layer.shape.layer_idx, step)
        layer.training_place.tell(key, first_row, rows)
    return len(layers)


def _device(layer: Any, model: nn.Module) -> torch.device:
    """Where the layer computes; one without tensors of its own, where the model does."""
    for module in (layer, model):
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")
