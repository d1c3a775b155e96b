"""Attention transfer: what a converted model learns by itself is trained towards the softmax attention it replaces.

The teacher is the same network: every layer computes softmax attention, and its output goes on to the next layer.
Beside it, on the same queries, keys and values, the layer computes its linear attention, whose error is the loss. No
labels, no second copy of the weights; all weights but those of the linear attention stay as they are.

Source: Zhang et al. 2024, arXiv:2402.04347 (attention weights); Zhang et al. 2024, arXiv:2410.10254 (outputs).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..errors import ConfigError, InputError
from ..integrations.advice import convert_first
from ..integrations.attach import family_layers
from ..integrations.batches import prepare_inputs, read_batches
from ..integrations.call import Call
from ..integrations.families import is_converted
from ..integrations.interface import linear_output, softmax_output
from ..integrations.layers import linear_layer
from ..integrations.observe import observed_attention
from ..integrations.wrappers import converted_parts, inside
from ..modules.base import AttentionInputs, LinearAttention
from ..modules.learned_maps import parameter_groups

LEARNING_RATE = 3e-2
EXACT = 1e-9  # relative error, squared, that is no more than rounding


@dataclass(frozen=True)
class TransferStep:
    """One step of `transfer_attention`.

    Args:
        step: From 0 on.
        errors: Relative error of the attention output of each converted layer, in the order of the layers: the root of
            the squared error over the variance of softmax's output, a mean over heads.
    """

    step: int
    errors: tuple[float, ...]


def transfer_attention(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int = 200,
    learning_rate: float = LEARNING_RATE,
    progress: bool = False,
) -> list[TransferStep]:
    """Train what a converted model's layers learn by themselves towards softmax attention.

    Adam, with a cosine decay of the learning rate to 0. Shifts and offsets of learned maps start in closed form from
    the first batch. For mixed precision, several processes, checkpoints: `AttentionTransferTrainer`.

    Args:
        model: Converted with settings that learn something, such as `FavorPlusConfig(learned=True)`. Changed in place.
        batches: Keyword arguments of the model's forward, as tensors; labels are left out. Read again from the start
            when they end before the steps do.
        steps: Batches to train on.
        learning_rate: Of the first step; residual maps (LARA, EVA) take 0.3 of it.
        progress: Show a progress bar.
    Returns: the error of every layer at every step.
    Raises:
        ConfigError: The model is not converted, or its layers learn nothing.
        InputError: No batches; one without a real token, or whose rows all fit into the window.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be an integer >= 1; got {steps!r}.")
    model = inside(model, "transfer_attention")
    parameters = learned_parameters(model)
    optimizer = torch.optim.Adam(parameter_groups(_layers(model).values(), learning_rate))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    found: list[TransferStep] = []
    with only(model, parameters):
        model.eval()
        for step, batch in enumerate(_repeated(batches, steps, progress)):
            if step == 0:
                start(model, batch)
            loss = transfer_loss(model, model, batch)
            loss.total.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            found.append(TransferStep(step, loss.errors()))
    return found


class AttentionTransferTrainer(Trainer):
    """A `Trainer` whose loss is the error of the linear attention of a converted model (`transfer_attention`).

    Everything is as with a Trainer: mixed precision, gradient accumulation, DDP, checkpoints, callbacks. Labels are
    not needed. Only what the layers learn by themselves is trained; afterwards parameters require gradients as before.

    Raises: ConfigError if the model is not converted, or its layers learn nothing.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        self._parameters = learned_parameters(inside(model, "AttentionTransferTrainer"))
        super().__init__(model, *args, **kwargs)
        self.can_return_loss = True  # without labels too
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated steps divide it
        self._has_started = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with only(inside(self.model, "AttentionTransferTrainer"), self._parameters):
            return super().train(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        inner = inside(self.accelerator.unwrap_model(model), "AttentionTransferTrainer")
        if model.training and not self._has_started:
            if self.state.global_step == 0:  # a resumed run has started already
                start(inner, inputs)
            self._has_started = True
        loss = transfer_loss(model, inner, inputs)
        return (loss.total, {"errors": loss.per_layer}) if return_outputs else loss.total

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


@dataclass(frozen=True)
class TransferLoss:
    """`total`: what is trained, a scalar. `per_layer`: `[layers]`, squared error over variance, mean over heads."""

    total: Tensor
    per_layer: Tensor

    def errors(self) -> tuple[float, ...]:
        return tuple(self.per_layer.detach().sqrt().tolist())


def learned_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """What the layers of a converted model learn by themselves. Raises `ConfigError` if that is nothing."""
    if not is_converted(model.config):
        raise ConfigError(
            f"Attention transfer needs a converted model; got {type(model).__name__}. "
            + (converted_parts(model).strip() or convert_first(getattr(model, "config", None)))
        )
    found = [parameter for layer in _layers(model).values() for parameter in layer.parameters()]
    if not found:
        kind = model.config.linear_attention["kind"]
        raise ConfigError(
            f"No layer of this model has anything to train by itself (kind {kind!r}). Convert with settings that"
            " learn, such as FavorPlusConfig(learned=True)."
        )
    return found


def transfer_loss(model: nn.Module, inner: PreTrainedModel, batch: Mapping[str, Any]) -> TransferLoss:
    """The error of every converted layer on one batch.

    Args:
        model: Which is called: `inner` itself, or what wraps it (DDP).
    Raises: InputError for a batch without a real token.
    """
    found: list[Tensor] = []
    number = len(_layers(inner))

    def on_layer(layer: LinearAttention[Any], module: nn.Module, call: Call, target: Tensor) -> Tensor:
        found.append(_relative_error(linear_output(module, call), target, call.key_mask))
        if model is inner or len(found) < number:
            return target
        # DDP looks for the parameters that take part in a step in the graph of what the model returns.
        return target + 0.0 * torch.stack(found).sum().to(target.dtype)

    _run(model, inner, batch, on_layer)
    per_layer = torch.stack(found)
    return TransferLoss(per_layer.mean(), per_layer)


@torch.no_grad()
def start(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Set what has a closed form from one batch: shifts and offsets of learned maps. The same on all processes.

    Raises: InputError for a batch whose rows all fit into the window, or without a real token.
    """
    found: list[tuple[LinearAttention[Any], dict[str, Tensor], Tensor]] = []

    def on_layer(layer: LinearAttention[Any], module: nn.Module, call: Call, target: Tensor) -> Tensor:
        error = _relative_error(linear_output(module, call), target, call.key_mask)
        inputs = AttentionInputs(
            call.query, call.key, call.value, call.key_mask, call.scaling, call.is_causal, grid=call.grid
        )
        found.append((layer, layer.learning_start(inputs, _average), error))
        return target

    _run(model, model, batch, on_layer)
    if all(bool(error < EXACT) for _, _, error in found):
        raise InputError(
            "All rows of the first batch fit into the window, where attention is exact: there is nothing to learn from"
            " them. Pass longer inputs, or convert with a smaller window_size."
        )
    for layer, values, _ in found:
        layer.set_tensors(values)


def _run(
    model: nn.Module,
    inner: PreTrainedModel,
    batch: Mapping[str, Any],
    on_layer: Callable[[LinearAttention[Any], nn.Module, Call, Tensor], Tensor],
) -> None:
    """Run a model on softmax attention.

    Args:
        on_layer: From a converted layer, its module, what it is called with and what softmax gives, to what the model
            goes on with.
    """
    layers = _layers(inner)

    def on_call(module: nn.Module, call: Call) -> Tensor:
        with torch.no_grad():
            target = softmax_output(module, call)
        return on_layer(layers[module], module, call, target) if module in layers else target

    inputs, _ = prepare_inputs(inner, batch)
    with observed_attention(inner, on_call):
        model(**inputs)


def _relative_error(output: Tensor, target: Tensor, key_mask: Tensor | None) -> Tensor:
    """Squared error over variance of the target, `[batch, tokens, heads, head_dim]`, a mean over heads.

    The variance is that of the tokens of all processes, so that a mean over processes is the error of their batches
    together.
    """
    target, output = target.float(), output.float()
    real = torch.ones_like(target[..., :1, :1]) if key_mask is None else key_mask[:, -target.shape[1] :, None, None]
    if not real.sum():
        raise InputError("A batch has no real token (its attention_mask is all 0). Leave such batches out.")
    count = _average(real.sum(dtype=torch.float32))
    mean = _average((target * real).sum((0, 1), keepdim=True)) / count
    error, spread = (((target - z).square() * real).sum((0, 1, 3)) for z in (output, mean))
    return (error / _average(spread.detach()).clamp_min(torch.finfo(torch.float32).tiny)).mean()


def _average(z: Tensor) -> Tensor:
    """The mean of a tensor without gradient over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return z
    z = z.clone()
    dist.all_reduce(z)
    return z / dist.get_world_size()


def _layers(model: PreTrainedModel) -> dict[nn.Module, LinearAttention[Any]]:
    return {module: layer for module in family_layers(model) if (layer := linear_layer(module)) is not None}


@contextlib.contextmanager
def only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the block no other parameter of the model requires a gradient; the train mode is put back after it."""
    training = [(module, module.training) for module in model.modules()]
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in parameters}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        for module, flag in training:
            module.training = flag


def _repeated(batches: Iterable[Mapping[str, Any]], steps: int, progress: bool) -> Iterator[Mapping[str, Any]]:
    """`steps` batches, from the start again where they end."""

    def passes() -> Iterator[Mapping[str, Any]]:
        while True:
            any_batch = False
            for batch in read_batches(batches, None, False, ""):
                any_batch = True
                yield batch
            if not any_batch:
                raise InputError("`batches` is empty, or an iterator that has ended: pass a list or a data loader.")

    return read_batches(passes(), steps, progress, "Attention transfer")
