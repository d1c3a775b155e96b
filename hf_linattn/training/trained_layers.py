"""Which layers attention transfer trains, what they learn by themselves, and where that starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distributed.fully_sharded import gathered, reshard
from ..errors import ConfigError, InputError
from ..integrations.advice import convert_first
from ..integrations.attach import family_layers
from ..integrations.batches import prepare_inputs
from ..integrations.call import Call
from ..integrations.families import is_converted
from ..integrations.interface import linear_output
from ..integrations.layers import linear_layer
from ..integrations.observe import kind_of, restored
from ..integrations.settings import check_layers
from ..integrations.wrappers import converted_parts
from ..modules.base import AttentionInputs, LinearAttention
from ..modules.registry import list_kinds
from .objective import average, check_finite, is_exact, mean_of, relative_error
from .teacher import softmax_pass


def trained_layers(model: PreTrainedModel, layers: Sequence[int] | None) -> dict[int, nn.Module]:
    """The attention modules to train, by index, ascending.

    Args:
        layers: Indices of converted layers; `None` for all of them.
    Raises: ConfigError if the model is not converted, `layers` are no indices of converted layers, or there is nothing
        that the layers learn by themselves.
    """
    if not is_converted(model.config):
        raise ConfigError(_not_converted(model))
    found = {index: module for index, module in enumerate(family_layers(model)) if linear_layer(module) is not None}
    if layers is not None:
        asked = check_layers(layers, model.config.num_hidden_layers) or ()
        on_softmax = [index for index in asked if index not in found]
        if on_softmax:
            raise ConfigError(
                f"layers must be among the converted ones, {list(found)}; conversion left {on_softmax} on softmax."
            )
        found = {index: found[index] for index in asked}
    if not learned_parameters(found):
        raise ConfigError(
            f"No layer of this model has anything to train by itself (kind {kind_of(model)!r}). Convert the model with"
            " settings that learn, such as FavorPlusConfig(learned=True)."
        )
    if any(layer.ablation is not None for layer in linear_layers(found)):
        raise ConfigError("Attention transfer trains whole layers: call it outside of ablated(model, ...).")
    if any(parameter.dtype == torch.float16 for parameter in learned_parameters(found)):
        raise ConfigError(
            "Learned maps must not be in float16, in which steps of Adam are not finite. Call model.float() first (and"
            " model.half() afterwards), or use AttentionTransferTrainer with fp16=True."
        )
    return found


def check_learning_rate(value: Any) -> None:
    """Raise `ConfigError` unless a learning rate is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigError(f"learning_rate must be a finite number >= 0; got {value!r}.")


def check_trains(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Raise `ConfigError` if an optimizer does not have all parameters that are to be trained."""
    has = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = sum(id(parameter) not in has for parameter in parameters)
    if missing:
        raise ConfigError(
            f"The optimizer lacks {missing} of the {len(parameters)} parameters that are to be trained. Build it after"
            " conversion, with those of the modules named 'linattn', or leave it to the Trainer."
        )


def _not_converted(model: PreTrainedModel) -> str:
    kind = kind_of(model)
    has = f", whose attention is linear without conversion ({kind!r}) and" if kind in list_kinds() else ", which"
    return f"Attention transfer needs a converted model; got {type(model).__name__}{has} learns no maps. " + (
        converted_parts(model).strip() or convert_first(getattr(model, "config", None))
    )


def learned_parameters(layers: Mapping[int, nn.Module]) -> list[nn.Parameter]:
    """What layers learn by themselves."""
    for layer in linear_layers(layers):
        reshard(layer)
    return [parameter for layer in linear_layers(layers) for parameter in layer.parameters()]


def linear_layers(layers: Mapping[int, nn.Module]) -> list[LinearAttention[Any]]:
    """The linear attention of attention modules."""
    return [_layer(module) for module in layers.values()]


def _layer(module: nn.Module) -> LinearAttention[Any]:
    layer = linear_layer(module)
    assert layer is not None
    return layer


@torch.no_grad()
def start(model: PreTrainedModel, batch: Mapping[str, Any], layers: Mapping[int, nn.Module]) -> None:
    """Set what has a closed form from one batch: shifts and offsets of learned maps, in layers without any.

    The same on all processes.

    Raises: InputError for a batch whose rows all fit into the window, without a real token, or not finite.
    """
    exact: list[Tensor] = []
    starts: list[tuple[LinearAttention[Any], dict[str, Tensor]]] = []

    def on_layer(module: nn.Module, call: Call, target: Tensor) -> None:
        layer = _layer(module)
        error = relative_error(linear_output(module, call), target, call.key_mask)
        check_finite(error)
        exact.append(is_exact(average(error), target.dtype))
        inputs = AttentionInputs(
            call.query, call.key, call.value, call.key_mask, call.scaling, call.is_causal, grid=call.grid
        )
        with gathered(layer):
            values = layer.learning_start(inputs, mean_of)
            if not has_started(layer, values):
                starts.append((layer, values))

    inputs, _ = prepare_inputs(model, batch)
    with restored(model):
        model.eval()
        softmax_pass(model, model, inputs, layers.values(), on_layer)
    if all(map(bool, exact)):
        raise InputError(
            "All rows of the first batch fit into the window, where attention is exact: there is nothing to learn from"
            " them. Pass longer inputs, or convert with a smaller window_size."
        )
    reshard(model)
    for layer, values in starts:
        layer.set_tensors(values)


def has_started(layer: LinearAttention[Any], values: Mapping[str, Tensor]) -> bool:
    """Whether a layer has left the zeros it begins with: an earlier call has set it, or trained it since."""
    tensors = layer.tensors()
    return all(bool(tensors[name].any()) for name, value in values.items() if value.any())


@contextlib.contextmanager
def only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the block no other parameter of the model requires a gradient.

    They begin and end without any; what required gradients before, and the train mode, are put back after it.
    """
    training = [(module, module.training) for module in model.modules()]
    # By place, not by object: FSDP2, which may begin within the block, puts others there.
    places = [(module, name) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    before = [_at(*place).requires_grad for place in places]
    chosen = {id(parameter) for parameter in parameters}
    trained = [place for place in places if id(_at(*place)) in chosen]
    try:
        for place in places:
            _at(*place).requires_grad_(id(_at(*place)) in chosen)
        _forget_gradients(trained)
        yield
    finally:
        reshard(model)
        _forget_gradients(trained)
        for place, required in zip(places, before, strict=True):
            _at(*place).requires_grad_(required)
        for module, flag in training:
            module.training = flag


def _forget_gradients(places: Iterable[tuple[nn.Module, str]]) -> None:
    for place in places:
        _at(*place).grad = None


def _at(module: nn.Module, name: str) -> nn.Parameter:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter
