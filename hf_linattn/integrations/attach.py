"""Give the layers of a model their linear attention, and take it away again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, LinAttnError, UnsupportedError
from ..modules.base import LinearAttention
from ..modules.registry import get_kind, list_kinds
from .expected import changed, describe
from .families import Family, defaults_family, get_family, is_causal_model, layer_shape, set_attention_dropout
from .hand_over import add_hook, remove_hook
from .layers import ATTRIBUTE, linear_layer
from .model_seams import mark_initialized
from .settings import LinearAttentionSettings, parse_settings

# What the layers of a model were made from, kept beside its config, which can be edited.
_MADE_FROM = "_linattn_made_from"
_UNDO = (
    "Layers are made when a model is converted: an edit has no effect, and a saved checkpoint would load as something "
    "else. Undo it, or revert the model (`hf_linattn.revert`) and convert it with the settings you want."
)


def settings_of(config: Any) -> LinearAttentionSettings:
    """The settings in a converted model's config, validated. Raises `CheckpointError` if there are none."""
    value = getattr(config, "linear_attention", None)
    if value is None:
        raise CheckpointError(
            f"{type(config).__name__} has no `linear_attention`, so it is unknown which attention the model uses. "
            "Loading a stock checkpoint into a LinAttn class needs it: from_pretrained(..., linear_attention=kind) "
            f"with one of {list_kinds()} or a kind's settings. In a converted checkpoint the field is missing from "
            "config.json: the checkpoint is damaged."
        )
    return parse_settings(value, family=defaults_family(config), num_layers=config.num_hidden_layers)


def build_layers(layers: list[nn.Module], settings: LinearAttentionSettings) -> dict[int, LinearAttention]:
    """New attention modules for the selected layers, on the device and in the dtype of the layers' weights.

    Raises: `UnsupportedError` where the kind cannot work, before anything has changed.
    """
    kind = get_kind(settings.config.kind)
    built = {}
    for index in settings.layers or ():
        layer = layers[index]
        shape = layer_shape(layer, index)
        if shape.is_causal and not kind.supports_causal:
            able = [name for name in list_kinds() if get_kind(name).supports_causal]
            raise UnsupportedError(
                f"{kind.title} ({kind.name!r}) has no causal form, and layer {index} is causal: a token would see "
                f"later ones. Use one of {able}."
            )
        is_image = defaults_family(layer.config) in ("vit", "vision")
        if is_image and settings.config.overlap_window and not kind.overlap_on_grids:
            able = [get_kind(name).title for name in list_kinds() if get_kind(name).overlap_on_grids]
            raise UnsupportedError(
                f"overlap_window=True of {kind.title} works on sequences, not on images. Use overlap_window=False with"
                f" a larger window_size, or {' or '.join(able)}, whose windows overlap on images too."
            )
        kind.module_cls.check_grid(settings.config, is_image=is_image)
        weight = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
        module = kind.module_cls(settings.config, shape)
        built[index] = module.to(device=weight.device, dtype=weight.dtype).train(layer.training)
    return built


def attach(model: Any, settings: LinearAttentionSettings, built: dict[int, LinearAttention]) -> None:
    """Attach built modules as `.linattn`; softmax layers get the stock attention dropout back."""
    for index, layer in enumerate(family_layers(model)):
        if index in built:
            setattr(layer, ATTRIBUTE, built[index])
            # Transformers initialises a model that is put into another one (EncoderDecoderModel) again, but for what
            # has this mark: statistics and trained maps would be lost. On the meta device there are no values yet.
            mark_initialized(built[index], not any(z.is_meta for z in built[index].tensors().values()))
            set_attention_dropout(layer, 0.0)
            if built[index].supports_recurrence(settings.config, is_causal=built[index].shape.is_causal):
                add_hook(layer)
        else:
            set_attention_dropout(layer, settings.attention_dropout or 0.0)
    for part in (model, model.base_model):
        setattr(part, _MADE_FROM, _told(part.config))


def _told(config: Any) -> tuple[dict[str, Any], bool]:
    return copy.deepcopy(config.linear_attention), is_causal_model(config)


def made_from(model: Any) -> LinearAttentionSettings:
    """The settings that a converted model's layers were made from, whatever has become of its config since."""
    settings, _ = getattr(model, _MADE_FROM)
    return parse_settings(settings, family=defaults_family(model.config), num_layers=len(family_layers(model)))


def check_unchanged(model: Any, asked: bool | None = None) -> None:
    """Raise if a converted model's config was edited, or the call asks, for other attention than its layers have.

    Args:
        asked: `is_causal` of the call, which overrides that of the config.
    Raises: `ConfigError` for other settings, `UnsupportedError` for the other direction.
    """
    config = model.config
    settings, is_causal = getattr(model, _MADE_FROM)
    if config.linear_attention is None:
        raise ConfigError(
            "config.linear_attention was removed from a converted model's config. Put it back, or revert the model "
            "(`hf_linattn.revert`)."
        )
    if config.linear_attention != settings:
        if torch.compiler.is_compiling():
            raise ConfigError(f"config.linear_attention was edited after conversion. {_UNDO}")
        check_consistent(model, ConfigError)
        setattr(model, _MADE_FROM, _told(config))
    wanted = is_causal_model(config) if asked is None else bool(asked)
    if wanted != is_causal:
        raise UnsupportedError(
            f"The layers were converted with is_causal={is_causal}, but the config (is_causal, is_decoder) or the "
            f"call says {wanted}. {convert_otherwise(config, wanted)}"
        )


def convert_otherwise(config: Any, is_causal: bool) -> str:
    """How to have converted layers with the other direction."""
    if is_causal and getattr(config, "is_causal", None) is not False and get_family(config).name == "bert":
        then = "save it, load it with is_decoder=True and convert that"
    else:
        then = f"set config.is_causal = {is_causal} and convert it again"
    return f"To have the other form, revert the model (`hf_linattn.revert`), {then}."


def detach(model: Any, settings: LinearAttentionSettings) -> None:
    """Remove `.linattn` from every layer and restore attention dropout."""
    for layer in family_layers(model):
        if hasattr(layer, ATTRIBUTE):
            delattr(layer, ATTRIBUTE)
        remove_hook(layer)
        set_attention_dropout(layer, settings.attention_dropout or 0.0)
    for part in (model, model.base_model):
        part.__dict__.pop(_MADE_FROM, None)


def check_consistent(model: Any, error: type[LinAttnError] = CheckpointError) -> None:
    """Raise if a model's config no longer describes its layers, as after editing the config."""
    settings = settings_of(model.config)
    for index, layer in enumerate(family_layers(model)):
        held = linear_layer(layer)
        told = settings.config if index in (settings.layers or ()) else None
        if (None if held is None else held.config) != told:
            raise error(
                f"config.linear_attention does not describe layer {index} any more: the layer has "
                f"{'softmax' if held is None else held.config}, the config says {told or 'softmax'}. {_UNDO}"
            )


def family_layers(model: Any) -> list[nn.Module]:
    """Self-attention modules of a supported model with any head, first layer first.

    Raises: `UnsupportedTransformersError` if the model does not have them where the family's models do.
    """
    family: Family = get_family(model.config)
    try:
        layers = family.layers(model.base_model)
        wrong = [type(layer).__name__ for layer in layers if not hasattr(layer, "is_causal")]
    except (AttributeError, TypeError) as error:
        raise changed("layers of a model", describe(error)) from error
    if wrong:
        raise changed("layers of a model", f"{wrong[0]} without is_causal")
    return layers
