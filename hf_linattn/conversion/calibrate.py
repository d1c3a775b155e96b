"""`calibrate`: closed-form statistics of a model's layers from data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distributed.fully_sharded import reshard, whole
from ..errors import ConfigError, InputError
from ..integrations.adapters import keep_in_adapters
from ..integrations.advice import convert_first
from ..integrations.attach import family_layers
from ..integrations.batches import prepare_inputs, read_batches
from ..integrations.call import Call
from ..integrations.canary import check_model
from ..integrations.families import is_converted
from ..integrations.interface import linear_output, softmax_output
from ..integrations.layers import active_layers, linear_layer
from ..integrations.observe import observed_attention
from ..integrations.wrappers import converted_parts, inside, module_of
from ..modules.base import LinearAttention
from ..modules.contract import AttentionInputs

ATTENTIONS = ("softmax", "linear")


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    attention: str = "softmax",
    max_batches: int | None = None,
    progress: bool = False,
    first_row: int | None = None,
) -> PreTrainedModel:
    """Set what a converted model's layers take from data: statistics (FAVOR#), proposals (LARA).

    One pass over the batches in evaluation mode, without gradients; O(head_dim^2) numbers per head are kept,
    whatever the amount of data (LARA: a sample of fixed size). Padding does not count. Calling it again replaces the
    statistics. In a distributed run every process passes its own batches and all end with the same statistics; of a
    model that FSDP2 has sharded as many on each, because its passes exchange weights.

    Args:
        model: Converted, as it is or wrapped. Changed in place. With an adapter (PEFT) in it the statistics are those
            of the adapter, which holds them from then on, as with `modules_to_save=["linattn"]`.
        batches: Keyword arguments of the model's forward, as tensors: what a data loader gives. Some tens of thousands
            of tokens of the kind of input the model is meant for. Labels are left out.
        attention: Which attention the layers run with meanwhile: "softmax", that of the pretrained weights, or
            "linear", their own, for a model that has been trained since its conversion (and calibrated before).
        max_batches: Stop after so many.
        progress: Show a progress bar.
        first_row: In a distributed run, the number of this process's first row among the rows of all processes, which
            number theirs on: the sample of LARA is then that of one process with all rows. `None`: every process
            samples by itself.
    Returns: `model`.
    Raises:
        ConfigError: The model is not converted, no layer of it has statistics to set, or its learned maps, which
            start from these statistics, have been trained.
        UnsupportedError: `model` holds no model, or several; see `integrations/wrappers.py`.
        InputError: No batches, not a series of dictionaries, or too few tokens.
    """
    if attention not in ATTENTIONS:
        raise InputError(f"attention must be one of {list(ATTENTIONS)}; got {attention!r}.")
    given, model = model, inside(model, "calibrate")
    check_model(model)
    layers = _calibratable(model)
    observed: dict[nn.Module, Any] = {
        m: layer.new_calibration(stream=_rank(), first_row=first_row) for m, layer in layers.items()
    }

    def on_call(module: nn.Module, call: Call) -> Tensor:
        if module in observed:
            observed[module].update(
                AttentionInputs(
                    call.query, call.key, call.value, call.key_mask, scaling=call.scaling, is_causal=call.is_causal
                )
            )
        goes_linear = attention == "linear" and not call.on_softmax
        return linear_output(module, call) if goes_linear else softmax_output(module, call)

    seen = 0
    with torch.no_grad(), observed_attention(model, on_call):
        model.eval()
        for batch in read_batches(batches, max_batches, progress, "Calibrating"):
            inputs, _ = prepare_inputs(model, batch)
            model(**inputs)
            seen += 1
    if not seen and _world_size() == 1:
        raise InputError("`batches` is empty: calibrate needs at least one batch of inputs.")
    results = []
    for module, calibration in observed.items():
        if _world_size() > 1:
            calibration.merge(_all_states(calibration.state(), model.device))
        results.append((module, calibration.result()))
    for module, values in results:
        _refuse_trained_maps(layers[module], values)
    keep_in_adapters(model, lambda layer: layer in layers.values())
    reshard(model)
    for module, values in results:  # all or none
        linear_layer(module).set_tensors(values)  # type: ignore[union-attr]
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


def _refuse_trained_maps(layer: LinearAttention, values: Mapping[str, Tensor]) -> None:
    """Raise `ConfigError` for learned maps that have left where they start, which `values` would put them back to."""
    others = [parameter for name, parameter in layer.named_parameters() if name not in values]  # 0 at the start
    if layer.config.learned and layer.is_calibrated and any(bool(whole(parameter).any()) for parameter in others):
        raise ConfigError(
            f"The learned maps of this model (kind {layer.kind!r}) have been trained, and calibrate() would put a part"
            " of them back to where they started. Calibrate before transfer_attention. To begin anew, revert the model"
            " (hf_linattn.revert), convert and calibrate it."
        )


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
