"""Attention transfer: what a converted model learns by itself is trained towards the softmax attention it replaces.

The teacher is the same network: every layer computes softmax attention, and its output goes on to the next layer.
Beside it, on the same queries, keys and values, the layer computes its linear attention, whose error is the loss. A
second stage trains all layers together, end to end, towards the hidden states of softmax. No labels, no second copy of
the weights; all weights but those of the linear attention stay as they are.

Source: Zhang et al. 2024, arXiv:2402.04347 (attention rows); Zhang et al. 2024, arXiv:2410.10254 (outputs).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..distributed.fully_sharded import is_sharded
from ..errors import InputError
from ..integrations.adapters import keep_in_adapters
from ..integrations.batches import read_batches
from ..integrations.wrappers import inside
from ..modules.learned_maps import parameter_groups
from .objective import Objective, average, check_finite, processes
from .teacher import LayerErrors, layer_errors
from .trained_layers import (
    check_learning_rate,
    learned_parameters,
    linear_layers,
    only,
    start,
    trained_layers,
)

logger = logging.getLogger(__name__)

LEARNING_RATES = {"attention": 3e-2, "hidden_states": 1e-2}  # of the targets
TEACHES_NOTHING = (
    "All rows of a batch fit into the window, where attention is exact: it teaches nothing. Leave out short inputs, or"
    " put several into one row. (Told once; there may be more.)"
)


@dataclass(frozen=True)
class TransferStep:
    """One step of `transfer_attention`.

    Args:
        step: From 0 on.
        errors: Relative error of each trained layer, in the order of the layers: the root of the squared error over
            the variance under softmax. Of the attention output, a mean over heads; with target="hidden_states" of the
            hidden states after the layer.
        layers: Indices of these layers.
    """

    step: int
    errors: tuple[float, ...]
    layers: tuple[int, ...]


def transfer_attention(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int = 200,
    learning_rate: float | None = None,
    target: str = "attention",
    layers: Sequence[int] | None = None,
    row_weight: float = 0.0,
    progress: bool = False,
) -> list[TransferStep]:
    """Train what a converted model's layers learn by themselves towards softmax attention.

    Adam, with a cosine decay of the learning rate to 0, in evaluation mode. Shifts and offsets of learned maps that
    have not been trained yet start in closed form from the first batch. Of several processes each passes its own
    batches, of one step together, and all end with the same maps; FSDP2 may have sharded the model
    (`shard_linear_attention`). For mixed precision and checkpoints: `AttentionTransferTrainer`.

    Args:
        model: Converted with settings that learn something, such as `FavorPlusConfig(learned=True)`. Changed in place.
            With an adapter (PEFT) in it, the maps are those of the adapter from then on, as with
            `modules_to_save=["linattn"]`.
            Its own weights under softmax are the teacher, so transfer comes before any other training.
        batches: Keyword arguments of the model's forward, as tensors; labels are left out. Read again from the start
            when they end before the steps do.
        steps: Batches to train on.
        learning_rate: Of the first step; residual maps (LARA, EVA) take 0.3 of it. `None`: 3e-2, or 1e-2 for hidden
            states.
        target: "attention": every layer by itself, towards the output of softmax on the inputs that it has under
            softmax. "hidden_states": a second stage, all layers together on linear attention end to end, towards the
            hidden states of softmax.
        layers: Indices of the layers to train; `None` for all converted ones. With target="attention" the network runs
            no further than the last of them, so several calls, each with a few layers, cost less than one.
        row_weight: Weight of the cross-entropy between the attention rows of softmax and of linear attention, added to
            the error (target="attention"). For inputs of at most 512 tokens: it takes
            `[batch, heads, tokens, tokens]` memory.
        progress: Show a progress bar with the error of every layer.
    Returns: the error of every trained layer at every step.
    Raises:
        ConfigError: The model is not converted, its layers learn nothing or are in float16, `layers` are no converted
            layers, or the other settings contradict each other.
        InputError: No batches; one without a real token, or with errors that are not finite; a first one whose rows
            all fit into the window; no number of steps; within `torch.inference_mode()`.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be an integer >= 1; got {steps!r}.")
    if torch.is_inference_mode_enabled():
        raise InputError("transfer_attention needs gradients: call it outside of torch.inference_mode().")
    objective = Objective(target, row_weight)
    learning_rate = LEARNING_RATES[target] if learning_rate is None else learning_rate
    check_learning_rate(learning_rate)
    model = inside(model, "transfer_attention")
    chosen = trained_layers(model, layers)
    keep_in_adapters(model, lambda layer: layer in linear_layers(chosen))
    parameters = learned_parameters(chosen)
    optimizer = torch.optim.Adam(parameter_groups(linear_layers(chosen), learning_rate))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    found: list[TransferStep] = []
    told = False
    # A caller's no_grad() is about what the model is used for afterwards.
    with torch.enable_grad(), only(model, parameters), _ProgressBar(steps, progress) as bar:
        for step, batch in enumerate(_repeated(batches, steps)):
            if step == 0:
                start(model, batch, chosen)
            errors = _backward(model, batch, chosen, objective)
            check_finite(errors.error)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if not told and bool(errors.is_exact.all()):
                logger.warning(TEACHES_NOTHING)
                told = True
            found.append(TransferStep(step, tuple(average(errors.error).sqrt().tolist()), tuple(chosen)))
            bar.show(found[-1])
    return found


def _backward(
    model: PreTrainedModel, batch: Mapping[str, Any], layers: Mapping[int, nn.Module], objective: Objective
) -> LayerErrors:
    """The errors on one batch, whose gradients are those of the batches of all processes."""
    sharded = is_sharded(model)  # then FSDP2 averages them, after the pass
    errors = layer_errors(model, model, batch, layers, objective, backward=not sharded)
    if sharded:
        errors.loss.sum().backward()
    elif processes() > 1:
        for parameter in learned_parameters(layers):
            parameter.grad = None if parameter.grad is None else average(parameter.grad)
    return errors


class _ProgressBar:
    """A bar of steps, with the error of every layer."""

    def __init__(self, steps: int, is_shown: bool) -> None:
        self._steps, self._is_shown = steps, is_shown

    def __enter__(self) -> _ProgressBar:
        self._bar: Any = None
        if self._is_shown:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=self._steps, desc="Attention transfer")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, step: TransferStep) -> None:
        if self._bar is not None:
            mean = sum(step.errors) / len(step.errors)
            layers = " ".join(f"{error:.2f}".removeprefix("0") for error in step.errors)
            self._bar.set_postfix_str(f"error {mean:.3f}, by layer {layers}", refresh=False)
            self._bar.update()


def _repeated(batches: Iterable[Mapping[str, Any]], steps: int) -> Iterator[Mapping[str, Any]]:
    """`steps` batches, from the start again where they end."""

    def passes() -> Iterator[Mapping[str, Any]]:
        while True:
            any_batch = False
            for batch in read_batches(batches, None, False, ""):
                any_batch = True
                yield batch
            if not any_batch:
                raise InputError("`batches` is empty, or an iterator that has ended: pass a list or a data loader.")

    return read_batches(passes(), steps, False, "")
