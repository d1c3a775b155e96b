"""From a stock model to one with linear attention, and back, in place."""

from __future__ import annotations

import copy as copying
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedError
from ..integrations.adapters import name_as_stock, name_as_unsaved
from ..integrations.advice import can_convert, convert_first
from ..integrations.attach import attach, build_layers, detach, family_layers, made_from, settings_of
from ..integrations.canary import check_model
from ..integrations.families import FAMILIES, defaults_family, get_family, is_converted
from ..integrations.model_seams import set_model_class
from ..integrations.names import natively
from ..integrations.seams import attention_of, select_attention
from ..integrations.settings import LinearAttentionSettings, check_layers, parse_settings
from ..integrations.wrappers import converted_parts, itself, refuse_adapter
from ..models import CONFIGS, COUNTERPARTS
from ..modules.config import AttentionConfig

logger = logging.getLogger(__name__)

_STOCK_IMPLEMENTATION = "_linattn_stock_attn_implementation"


def convert(
    model: PreTrainedModel,
    config: str | AttentionConfig | Mapping[str, Any],
    layers: Sequence[int] | None = None,
    *,
    copy: bool = False,
) -> PreTrainedModel:
    """Replace softmax attention in a BERT, GPT-2 or ViT with any stock head.

    The model's class becomes its LinAttn counterpart and its config a LinAttn config. All weights are kept; each
    converted layer gets a module `.linattn` with its own state. Attention dropout, which a linear kind cannot apply,
    becomes 0 in converted layers. Nothing has changed if an error is raised.

    Args:
        model: A model of a stock class. A part of a composite one (EncoderDecoderModel) before it is put together,
            whose config would not follow.
        config: A kind's name, a kind's settings such as `FavorPlusConfig(num_features=512)`, or a dictionary of them.
        layers: Layers to convert; `None` means all. The others keep softmax.
        copy: Convert a deep copy and leave `model` as it is.
    Returns: The converted model: `model` itself unless `copy`.
    Raises:
        UnsupportedTransformersError: The installed Transformers works in another way.
        UnsupportedError: Already converted, another architecture, a subclass of a stock class, or a kind that cannot
            work in this model.
        ConfigError: Unknown kind, unknown or impossible setting, layers that do not exist.
    """
    model = itself(model, "convert")
    if is_converted(getattr(model, "config", None)) or type(model) in COUNTERPARTS.values():
        kind = settings_of(model.config).config.kind
        raise UnsupportedError(
            f"{type(model).__name__} is already converted (to {kind!r}). Call hf_linattn.revert(model) first to "
            "convert it to something else; trained weights are kept."
        )
    if not can_convert(model.config):
        raise UnsupportedError(
            f"Conversion is implemented for the architectures {list(FAMILIES)}; got model_type"
            f" {model.config.model_type!r}. {natively(model, _kind_of(config))}"
        )
    family = get_family(model.config)
    refuse_adapter(model, "convert")
    check_model(model)
    if type(model) not in COUNTERPARTS:
        known = sorted(
            cls.__name__ for cls in COUNTERPARTS if getattr(cls.config_class, "model_type", "") == family.name
        )
        raise UnsupportedError(
            f"convert() needs a model of one of the classes {known}; got {type(model).__name__}. Convert the "
            "stock model and derive your class from its LinAttn counterpart."
        )
    count = model.config.num_hidden_layers
    settings = parse_settings(config, family=defaults_family(model.config), num_layers=count)
    if layers is not None:
        settings = LinearAttentionSettings(settings.config, check_layers(layers, count), settings.attention_dropout)
    if copy:
        model = copying.deepcopy(model)
    built = build_layers(family_layers(model), settings)

    old_config, old_class = model.config, type(model)
    new_config = copying.deepcopy(old_config)
    new_config.__class__ = CONFIGS[family.name]
    new_config.__dict__.pop("model_type", None)  # a config read from a checkpoint carries its own
    new_config.linear_attention = settings.to_dict()
    settings = settings_of(new_config)
    implementation = attention_of(old_config)
    select_attention(new_config, settings.config.kind)
    with _unchanged_on_error(model):
        _set_config(model, old_config, new_config)
        _set_classes(model, COUNTERPARTS)
        attach(model, settings, built)
        setattr(model, _STOCK_IMPLEMENTATION, implementation)
        name_as_unsaved(model, settings.config.kind)
    _report(model, old_class.__name__, settings)
    return model


def _kind_of(config: Any) -> Any:
    """The name in what was given as settings, which have not been checked."""
    if isinstance(config, Mapping):
        return config.get("kind")
    return getattr(config, "kind", config)


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert` in place: the stock class and config, softmax attention, trained weights kept.

    Works on models loaded from converted checkpoints too. Attention dropout gets its stock value back.
    Raises: `UnsupportedError` if the model is not a converted one.
    """
    stock = {converted: cls for cls, converted in COUNTERPARTS.items()}
    model = itself(model, "revert")
    if type(model) not in stock:
        raise UnsupportedError(
            f"revert() needs a converted model; got {type(model).__name__}. "
            + (converted_parts(model).strip() or convert_first(getattr(model, "config", None)))
        )
    refuse_adapter(model, "revert")
    check_model(model)
    settings = made_from(model)
    family = get_family(model.config)
    old_config = model.config
    new_config = copying.deepcopy(old_config)
    new_config.__class__ = stock[type(model)].config_class
    new_config.__dict__.pop("model_type", None)
    del new_config.linear_attention
    setattr(new_config, family.dropout_field, settings.attention_dropout or 0.0)
    with _unchanged_on_error(model):
        detach(model, settings)
        _set_config(model, old_config, new_config)
        _set_classes(model, stock)
        name_as_stock(model)
        remembered = model.__dict__.pop(_STOCK_IMPLEMENTATION, None)
        select_attention(new_config, model.get_correct_attn_implementation(remembered))
    if new_config.architectures is not None:
        new_config.architectures = [type(model).__name__]
    return model


def _set_config(model: PreTrainedModel, old: Any, new: Any) -> None:
    """Replace a config in every module that holds it."""
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new


def _set_classes(model: PreTrainedModel, classes: Mapping[Any, Any]) -> None:
    """Swap the class of the model and of the base model inside it."""
    for part in {id(m): m for m in (model.base_model, model)}.values():
        if type(part) not in classes:
            raise UnsupportedError(
                f"The base model inside must be of a stock class; got {type(part).__name__}. Put the stock one there, "
                "or derive your class from its LinAttn counterpart."
            )
        set_model_class(part, classes[type(part)])


def _report(model: PreTrainedModel, stock_name: str, settings: LinearAttentionSettings) -> None:
    """Say what has been converted, what is new, and what became of attention dropout."""
    count = model.config.num_hidden_layers
    converted = settings.layers or ()
    learned = [parameter for layer in converted for parameter in family_layers(model)[layer].linattn.parameters()]  # type: ignore[union-attr]
    logger.info(
        "Converted %s to %s: %s in %s; %d new learned parameters.",
        stock_name,
        type(model).__name__,
        settings.config.kind,
        "all layers" if len(converted) == count else f"layers {list(converted)} of {count}, softmax in the others",
        sum(parameter.numel() for parameter in learned),
    )
    if settings.attention_dropout:
        logger.warning(
            "Attention dropout was %s and is now 0 in converted layers: linear attention has no attention weights to "
            "drop. `slot_dropout` in the kind's settings is its replacement; revert() restores it.",
            settings.attention_dropout,
        )


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put back classes, attributes, submodules and hooks of all modules if the block raises; no tensors are copied."""
    kept = [
        (module, type(module), {k: copying.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes in kept:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        raise
