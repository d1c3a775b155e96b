"""The teacher of attention transfer is the network itself under softmax: its passes, and the errors of the layers.

Both passes are in evaluation mode: dropout and the noise of kinds would only blur what is compared.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distributed.fully_sharded import is_part, is_sharded, is_unit
from ..errors import ConfigError, UnsupportedError
from ..integrations.batches import prepare_inputs
from ..integrations.call import Call
from ..integrations.interface import softmax_output
from ..integrations.layers import linear_layer
from ..integrations.observe import kind_of, observed_attention, restored
from ..modules.base import LinearAttention
from .objective import Objective, is_exact, relative_error

# What a model's own forward is called with.
Forward = Callable[..., Any]
# From a layer's attention module, its call and what softmax gives, to what is asked of the layer.
OnLayer = Callable[[nn.Module, Call, Tensor], None]


class LayerErrors(NamedTuple):
    """Of one batch, `[layers]` each.

    Args:
        loss: What is minimised; without a graph if its gradients have been accumulated already.
        error: Squared error over variance, without a graph.
        is_exact: Whether that is no more than rounding: linear attention was softmax.
    """

    loss: Tensor
    error: Tensor
    is_exact: Tensor


def layer_errors(
    model: nn.Module,
    inner: PreTrainedModel,
    batch: Mapping[str, Any],
    layers: Mapping[int, nn.Module],
    objective: Objective,
    *,
    backward: bool = False,
) -> LayerErrors:
    """The errors of some layers on one batch.

    Args:
        model: What is called: `inner` itself, or what wraps it. DDP looks for the parameters that take part in a step
            in the graph of what the model returns; here that is the errors.
        layers: Attention modules of `inner` by index, ascending.
        backward: Accumulate the gradients of the sum of the losses, at once where layers do not depend on each other:
            then the memory of one layer is enough.
    Raises: InputError for a batch without a real token, or one that is too long for the objective.
    """
    inputs, key_mask = prepare_inputs(inner, batch)
    _check_units(layers)

    def errors(forward: Forward, **inputs: Any) -> LayerErrors:
        if objective.target == "attention":
            return _attention_errors(inner, forward, inputs, layers, objective, backward)
        return _hidden_state_errors(inner, forward, inputs, layers, key_mask, backward)

    with (
        restored(inner),
        in_place_of_forward(inner, errors),
        _units_in_graph(layers.values()),
        torch.compiler.set_stance("force_eager"),
    ):
        inner.eval()
        inner.set_attn_implementation(kind_of(inner))  # it may run on softmax at present
        found: LayerErrors = model(**inputs)
    return found


def _check_units(layers: Mapping[int, nn.Module]) -> None:
    """Raise `ConfigError` for layers that FSDP2 gathers with others: the passes of those have no gradients."""
    for index, module in layers.items():
        layer: LinearAttention[Any] = linear_layer(module)  # type: ignore[assignment]
        if not is_unit(layer) and any(is_part(parameter) for parameter in layer.parameters()):
            raise ConfigError(
                f"FSDP2 shards what layer {index} learns together with other weights, whose passes are without"
                " gradients. Call hf_linattn.training.shard_linear_attention(model) before fully_shard; where"
                f" Accelerate does it, wrap {type(layer).__name__} too (fsdp_transformer_layer_cls_to_wrap)."
            )


def _attention_errors(
    model: PreTrainedModel,
    forward: Forward,
    inputs: dict[str, Any],
    layers: Mapping[int, nn.Module],
    objective: Objective,
    backward: bool,
) -> LayerErrors:
    """Every layer on what softmax attends to."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with_graph = torch.is_grad_enabled()

    def on_layer(module: nn.Module, call: Call, target: Tensor) -> None:
        with torch.set_grad_enabled(with_graph):
            loss, error = objective.of_layer(module, call, target)
            loss = in_graph(module, loss)
            if backward:
                loss.backward()
                loss = loss.detach()
            found.append((loss, error, is_exact(error, target.dtype)))

    softmax_pass(model, forward, inputs, layers.values(), on_layer)
    return LayerErrors(*(torch.stack(each) for each in zip(*found, strict=True)))


def _hidden_state_errors(
    model: PreTrainedModel,
    forward: Forward,
    inputs: dict[str, Any],
    layers: Mapping[int, nn.Module],
    key_mask: Tensor | None,
    backward: bool,
) -> LayerErrors:
    """The hidden states after every layer, of linear attention end to end beside those of softmax."""
    run = functools.partial(_hidden_states, model, forward, inputs, layers)
    with torch.no_grad(), observed_attention(model, softmax_output):
        targets = run()
    errors = [relative_error(*pair, key_mask) for pair in zip(run(), targets, strict=True)]
    loss = torch.stack([in_graph(module, error) for module, error in zip(layers.values(), errors, strict=True)])
    if backward:
        loss.sum().backward()
        loss = loss.detach()
    error = torch.stack(errors).detach()
    return LayerErrors(loss, error, is_exact(error, targets[0].dtype))


def softmax_pass(
    model: PreTrainedModel, forward: Forward, inputs: dict[str, Any], layers: Iterable[nn.Module], on_layer: OnLayer
) -> None:
    """Run a model under softmax, without gradients and no further than some of its layers (under FSDP2 to its end).

    Args:
        on_layer: Called for each of `layers`, in the order of the model.
    Raises: UnsupportedError if the pass does not reach all of them.
    """
    waiting, may_stop = set(layers), not is_sharded(model)

    def on_call(module: nn.Module, call: Call) -> Tensor:
        target = softmax_output(module, call)
        if module in waiting:
            waiting.remove(module)
            on_layer(module, call, target)
            if not waiting and may_stop:
                raise _Finished
        return target

    with torch.no_grad(), observed_attention(model, on_call), contextlib.suppress(_Finished):
        forward(**inputs)
    if waiting:
        raise UnsupportedError(
            f"{len(waiting)} of the layers to train were not reached through {type(model).__name__}: they hold another"
            " config than the model, as in an EncoderDecoderModel, or the model skips them. Train the part before it"
            " is put together."
        )


def _hidden_states(
    model: PreTrainedModel, forward: Forward, inputs: dict[str, Any], layers: Mapping[int, nn.Module]
) -> list[Tensor]:
    """Hidden states after some layers, `[batch, tokens, 1, dim]`: what `output_hidden_states` returns of them."""
    outputs: list[Any] = []

    def finish(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output)
        raise _Finished  # before the head

    handle = None if is_sharded(model) else model.base_model.register_forward_hook(finish)
    try:
        with contextlib.suppress(_Finished):
            outputs.append(forward(**{**inputs, "output_hidden_states": True, "return_dict": True}))
    finally:
        if handle is not None:
            handle.remove()
    hidden_states = outputs[0].hidden_states
    return [hidden_states[index + 1].unsqueeze(2) for index in layers]


def in_graph(module: nn.Module, z: Tensor) -> Tensor:
    """`z`, with all that a layer learns in its graph: rows that fit into one window use no slots."""
    layer: LinearAttention[Any] = linear_layer(module)  # type: ignore[assignment]
    return layer.in_training(z) if torch.is_grad_enabled() and not is_unit(layer) else z


@contextlib.contextmanager
def _units_in_graph(layers: Iterable[nn.Module]) -> Iterator[None]:
    """The same for units of FSDP2, which have whole parameters only within their own pass."""

    def finish(layer: Any, arguments: Any, output: Tensor) -> Tensor:
        found: Tensor = layer.in_training(output) if torch.is_grad_enabled() else output
        return found

    units: list[Any] = [layer for layer in map(linear_layer, layers) if layer is not None and is_unit(layer)]
    handles = [unit.register_forward_hook(finish, prepend=True) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Finished(Exception):
    """What a pass was for has been found.

    Not raised in models that FSDP2 shards: it would leave units gathered that are not done.
    """


@contextlib.contextmanager
def in_place_of_forward(model: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block a call of the model, or of what wraps it, returns `function(own_forward, **inputs)`."""
    own, had = model.forward, vars(model).get("forward")
    model.forward = functools.partial(function, own)
    try:
        yield
    finally:
        if had is None:
            del model.forward
        else:
            model.forward = had
