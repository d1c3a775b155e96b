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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..errors import ConfigError, InputError
from ..integrations.adapters import keep_in_adapters
from ..integrations.batches import read_batches
from ..integrations.wrappers import inside
from ..modules.base import LinearAttention
from ..modules.learned_maps import parameter_groups
from .objective import Objective, average, check_finite
from .teacher import layer_errors
from .trained_layers import (
    check_learning_rate,
    check_trains,
    learned_parameters,
    linear_layers,
    only,
    start,
    trained_layers,
)

logger = logging.getLogger(__name__)

LEARNING_RATE = 3e-2
TRAINER_RATE = 5e-5  # what TrainingArguments have if nothing is said
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
    learning_rate: float = LEARNING_RATE,
    target: str = "attention",
    layers: Sequence[int] | None = None,
    row_weight: float = 0.0,
    progress: bool = False,
) -> list[TransferStep]:
    """Train what a converted model's layers learn by themselves towards softmax attention.

    Adam, with a cosine decay of the learning rate to 0, in evaluation mode. Shifts and offsets of learned maps that
    have not been trained yet start in closed form from the first batch. For mixed precision, several processes,
    checkpoints: `AttentionTransferTrainer`.

    Args:
        model: Converted with settings that learn something, such as `FavorPlusConfig(learned=True)`. Changed in place.
            With an adapter (PEFT) in it, the maps are those of the adapter from then on, as with
            `modules_to_save=["linattn"]`.
            Its own weights under softmax are the teacher, so transfer comes before any other training.
        batches: Keyword arguments of the model's forward, as tensors; labels are left out. Read again from the start
            when they end before the steps do.
        steps: Batches to train on.
        learning_rate: Of the first step; residual maps (LARA, EVA) take 0.3 of it.
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
    check_learning_rate(learning_rate)
    objective = Objective(target, row_weight)
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
            errors = layer_errors(model, model, batch, chosen, objective, backward=True)
            check_finite(errors.error)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if not told and bool(errors.is_exact.all()):
                logger.warning(TEACHES_NOTHING)
                told = True
            found.append(TransferStep(step, tuple(errors.error.sqrt().tolist()), tuple(chosen)))
            bar.show(found[-1])
    return found


class AttentionTransferTrainer(Trainer):
    """A `Trainer` whose loss is the error of the linear attention of a converted model (`transfer_attention`).

    Everything is as with a Trainer: mixed precision, gradient accumulation, DDP, checkpoints, callbacks. Labels are
    not needed. Passes are in evaluation mode, without dropout. Only what the layers learn by themselves is trained;
    afterwards parameters require gradients as before. Logs have the loss, `error` and `error_layer_<index>`: relative
    errors, as in `TransferStep`.

    Args:
        target, layers, row_weight: As in `transfer_attention`.
        The others as in `Trainer`.
    Raises: ConfigError if the model is not converted, its layers learn nothing, or the arguments contradict each
        other; for `torch_compile` and for several GPUs in one process.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        target: str = "attention",
        layers: Sequence[int] | None = None,
        row_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self._objective = Objective(target, row_weight)
        inner = inside(model, "AttentionTransferTrainer")
        self._layers = trained_layers(inner, layers)
        keep_in_adapters(inner, lambda layer: layer in linear_layers(self._layers))
        super().__init__(model, *args, **kwargs)
        _check_arguments(self.args)
        self.can_return_loss = True  # without labels too
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated steps divide it
        self._has_started = False
        self._has_told = False
        self._error_sum: Tensor | float = 0.0  # of the batches since the last log
        self._any_exact: Tensor | bool = False
        self._batches = 0

    def set_target(self, target: str, row_weight: float = 0.0) -> None:
        """Train towards another target from the next step on, as in `transfer_attention`: two stages in one run."""
        self._objective = Objective(target, row_weight)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_given = self.optimizer is not None
        if is_given:
            check_trains(self.optimizer, learned_parameters(self._layers))
        elif self.optimizer_cls_and_kwargs is None:
            check_learning_rate(self.args.learning_rate)
        with self._only_learned():
            optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if not is_given:
            _set_learning_rates(optimizer, linear_layers(self._layers))
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._only_learned():
            return super().train(*args, **kwargs)

    def _only_learned(self) -> AbstractContextManager[None]:
        return only(inside(self.model, "AttentionTransferTrainer"), learned_parameters(self._layers))

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        inner, is_training = inside(self.accelerator.unwrap_model(model), "AttentionTransferTrainer"), model.training
        if is_training and not self._has_started:
            if self.state.global_step == 0:  # a resumed run has started already
                start(inner, inputs, self._layers)
            self._has_started = True
        found = layer_errors(model, inner, inputs, self._layers, self._objective)
        if is_training:
            check_finite(found.error)
            self._batches += 1
            self._error_sum = self._error_sum + found.error
            self._any_exact = self._any_exact | found.is_exact.all()
        return (found.loss.mean(), {"errors": found.error}) if return_outputs else found.loss.mean()

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._batches:
            error = average(torch.as_tensor(self._error_sum) / self._batches).sqrt().tolist()
            logs["error"] = sum(error) / len(error)
            logs |= {f"error_layer_{index}": each for index, each in zip(self._layers, error, strict=True)}
            if self._any_exact and not self._has_told:
                logger.warning(TEACHES_NOTHING)
                self._has_told = True
            self._error_sum, self._any_exact, self._batches = 0.0, False, 0
        super().log(logs, *args, **kwargs)


def _set_learning_rates(optimizer: torch.optim.Optimizer, layers: Sequence[LinearAttention[Any]]) -> None:
    """Split groups of parameters by the learning rates of `parameter_groups`."""
    factors = {id(p): group["lr"] for group in parameter_groups(layers, 1.0) for p in group["params"]}
    found = []
    for group in optimizer.param_groups:
        rate = group["lr"]
        if not isinstance(rate, (int, float)):  # an optimizer with a schedule of its own
            return
        if rate <= TRAINER_RATE:
            logger.warning(
                "learning_rate is %g: learned maps hardly move with it. TrainingArguments have %g by default,"
                " transfer_attention %g.",
                rate,
                TRAINER_RATE,
                LEARNING_RATE,
            )
        for factor in dict.fromkeys(factors[id(p)] for p in group["params"]):
            parameters = [p for p in group["params"] if factors[id(p)] == factor]
            found.append({**group, "lr": factor * rate, "params": parameters})
    optimizer.param_groups[:] = found


def _check_arguments(args: Any) -> None:
    """Raise `ConfigError` for arguments of a Trainer with which layers cannot be looked into."""
    if args.torch_compile:
        raise ConfigError(
            "torch_compile must be False for attention transfer, which looks into the layers while the model runs."
            " Compile the model afterwards."
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"Attention transfer needs a process for each GPU; got one process with {args.n_gpu}. Launch it with"
            " torchrun or accelerate, or set CUDA_VISIBLE_DEVICES to one GPU."
        )


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
