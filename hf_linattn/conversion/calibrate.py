"""`calibrate`: closed-form statistics of a model's layers from data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError, InputError
from ..integrations.adapters import keep_in_adapters
from ..integrations.advice import convert_first
from ..integrations.attach import family_layers
from ..integrations.canary import check_model
from ..integrations.checks import check_mask
from ..integrations.families import is_converted
from ..integrations.interface import attend, causality
from ..integrations.layers import active_layers, linear_layer
from ..integrations.masks import linattn_mask
from ..integrations.seams import check_scaling, register_attention
from ..integrations.token_mask import token_mask
from ..integrations.wrappers import converted_parts, inside, module_of
from ..modules.base import AttentionInputs, Calibration, LinearAttention
from .batches import exact_attention, prepare_inputs, read_batches, restored

# Attention that shows its queries and keys to a layer's calibration.
OBSERVER = "linattn_observer"
ATTENTIONS = ("softmax", "linear")

_OBSERVED: ContextVar[tuple[str, dict[nn.Module, Calibration]]] = ContextVar("observed")


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    attention: str = "softmax",
    max_batches: int | None = None,
    progress: bool = False,
) -> PreTrainedModel:
    """Set what a converted model's layers take from data: statistics (FAVOR#), proposals (LARA).

    One pass over the batches in evaluation mode, without gradients; O(head_dim^2) numbers per head are kept,
    whatever the amount of data (LARA: a sample of fixed size). Padding does not count. Calling it again replaces the
    statistics. In a distributed run every process passes its own batches and all end with the same statistics.

    Args:
        model: Converted, as it is or wrapped. Changed in place. With an adapter (PEFT) in it the statistics are those
            of the adapter, which holds them from then on, as with `modules_to_save=["linattn"]`.
        batches: Keyword arguments of the model's forward, as tensors: what a data loader gives. Some tens of thousands
            of tokens of the kind of input the model is meant for. Labels are left out.
        attention: Which attention the layers run with meanwhile: "softmax", that of the pretrained weights, or
            "linear", their own, for a model that has been trained since its conversion (and calibrated before).
        max_batches: Stop after so many.
        progress: Show a progress bar.
    Returns: `model`.
    Raises:
        ConfigError: The model is not converted, or no layer of it has statistics to set.
        UnsupportedError: `model` holds no model, or several; see `integrations/wrappers.py`.
        InputError: No batches, not a series of dictionaries, or too few tokens.
    """
    if attention not in ATTENTIONS:
        raise InputError(f"attention must be one of {list(ATTENTIONS)}; got {attention!r}.")
    given, model = model, inside(model, "calibrate")
    check_model(model)
    layers = _calibratable(model)
    observed: dict[nn.Module, Any] = {m: layer.new_calibration(stream=_rank()) for m, layer in layers.items()}
    register_attention(OBSERVER, _observe, linattn_mask)
    seen = 0
    with restored(model), torch.no_grad():
        model.eval()
        model.set_attn_implementation(OBSERVER)
        token = _OBSERVED.set((attention, observed))
        try:
            for batch in read_batches(batches, max_batches, progress, "Calibrating"):
                inputs, _ = prepare_inputs(model, batch)
                model(**inputs)
                seen += 1
        finally:
            _OBSERVED.reset(token)
    if not seen and _world_size() == 1:
        raise InputError("`batches` is empty: calibrate needs at least one batch of inputs.")
    results = []
    for module, calibration in observed.items():
        if _world_size() > 1:
            calibration.merge(_all_states(calibration.state(), model.device))
        results.append((module, calibration.result()))
    keep_in_adapters(model, lambda layer: layer in layers.values())
    for module, values in results:  # all or none
        linear_layer(module).set_buffers(values)  # type: ignore[union-attr]
    return given


def needs_calibration(model: nn.Module) -> bool:
    """Whether some layer of a model has to be calibrated before it can be used. Reads values."""
    layers = active_layers(module_of(model, "needs_calibration"))
    return any(not bool(count) for layer in layers if (count := layer._buffers.get("calibrated_tokens")) is not None)


def _calibratable(model: PreTrainedModel) -> dict[nn.Module, LinearAttention]:
    """The attention modules with statistics to set, and the layer of each."""
    if not is_converted(model.config):
        raise ConfigError(
            f"calibrate() needs a converted model; got {type(model).__name__}, which keeps no statistics. "
            + (converted_parts(model).strip() or convert_first(getattr(model, "config", None)))
        )
    converted = {module: layer for module in family_layers(model) if (layer := linear_layer(module)) is not None}
    layers = {module: layer for module, layer in converted.items() if layer.new_calibration() is not None}
    if not layers:
        kind = model.config.linear_attention["kind"]
        raise ConfigError(
            f"No layer of this model has statistics to calibrate (kind {kind!r}). Those of FAVOR# have them in causal"
            " layers and with FavorSharpConfig(statistics='calibrated'), those of LARA in causal layers and with"
            " LaraConfig(proposal_source='calibrated')."
        )
    return layers


def _observe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Show a layer's inputs to its calibration, and go on with the attention that was asked for."""
    attention, observed = _OBSERVED.get()
    linear = linear_layer(module)
    mask = token_mask(attention_mask, query.device)
    check_mask(mask)
    if mask is not None and mask.shape[1] != key.shape[2]:
        raise InputError(f"attention_mask must cover the {key.shape[2]} tokens; got {tuple(mask.shape)}.")
    is_causal = causality(module, kwargs)
    if module in observed:
        scale = check_scaling(module, scaling, query.shape[-1])
        observed[module].update(AttentionInputs(query, key, value, mask, scaling=scale, is_causal=is_causal))
    if attention == "linear" and linear is not None:
        return attend(linear.kind, module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return exact_attention(module, query, key, value, mask, scaling=scaling, is_causal=is_causal), None


# -- several processes ----------------------------------------------------------------------------------------------
def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world_size() > 1 else 0


def _all_states(state: dict[str, Tensor], device: torch.device) -> list[dict[str, Tensor]]:
    """The states of all processes, in rank order."""
    gathered: list[dict[str, Tensor]] = [{} for _ in range(_world_size())]
    for name, tensor in state.items():
        parts = [torch.empty_like(tensor, device=device) for _ in gathered]
        dist.all_gather(parts, tensor.to(device).contiguous())
        for place, part in zip(gathered, parts, strict=True):
            place[name] = part.to(tensor.device)
    return gathered
