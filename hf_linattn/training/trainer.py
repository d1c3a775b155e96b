"""`AttentionTransferTrainer`: attention transfer with all that a `Trainer` does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..distributed.fully_sharded import keep_precision
from ..errors import ConfigError
from ..integrations.adapters import keep_in_adapters
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
from .transfer import LEARNING_RATES, TEACHES_NOTHING

logger = logging.getLogger(__name__)

TRAINER_RATE = 5e-5  # what TrainingArguments have if nothing is said


class AttentionTransferTrainer(Trainer):
    """A `Trainer` whose loss is the error of the linear attention of a converted model (`transfer_attention`).

    Everything is as with a Trainer: mixed precision, gradient accumulation, DDP, FSDP2 (with the linear attention as
    a unit of its own, docs/clusters.md), checkpoints, callbacks. Labels are not needed. Passes are in evaluation mode,
    without dropout. Only what the layers learn by themselves is trained; afterwards parameters require gradients as
    before. Logs have the loss, `error` and `error_layer_<index>`: relative errors, as in `TransferStep`.

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
        self._has_begun = self._has_started = False
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
        if not self._has_begun:
            keep_precision(inner)  # before the first pass
            self._has_begun = True
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
                LEARNING_RATES["attention"],
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
