"""`ablated`: a converted model without one part of its attention, to see what it lives on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from ..errors import ConfigError, UnsupportedError, did_you_mean
from ..integrations.advice import convert_first
from ..integrations.families import is_converted
from ..integrations.layers import active_layers
from ..integrations.observe import kind_of
from ..integrations.seams import attention_of
from ..integrations.wrappers import converted_parts, inside
from ..modules.base import LinearAttention
from ..modules.registry import get_kind
from ..ops.ablation import ABLATIONS, SHUFFLED_SLOTS, WINDOW_ALONE


@contextmanager
def ablated(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Within the `with` block, the linear attention of a converted model goes without one part of it.

    * "window_alone": slots hold no mass. Queries read what they read exactly: the keys of their window, heavy keys,
      global tokens.
    * "slots_alone": nothing is read exactly, every key goes through slots, and no values are convolved. EVA: a query
      reads all chunks or, in a decoder, those that end before its own begins (the first tokens then read nothing, and
      `max_chunks` has no effect); global tokens, which are in no chunk, stay exact.
    * "shuffled_slots": a query reads slot j + 1 where it should read slot j. EVA: every chunk has the value of the
      chunk before it; the first that of the last or, in a decoder, its own.

    Parameters and buffers stay as they are, and everything is as before afterwards. In the block the model keeps no
    cache (`config.use_cache` is False; pass `use_cache=False` to `generate`), and cannot be compiled.

    Args:
        model: Converted, of any kind, with its kind as the attention implementation.
        what: "window_alone", "slots_alone" or "shuffled_slots".
    Raises:
        ConfigError: An unknown name; a model that is not converted, or runs on softmax at present.
        UnsupportedError: The model has no such part: no window, or a single slot. It is ablated already. In the block:
            a call with a cache, or in compiled code.
    """
    if what not in ABLATIONS:
        raise ConfigError(f"what must be one of {list(ABLATIONS)}; got {what!r}.{did_you_mean(what, ABLATIONS)}")
    model = inside(model, "ablated")
    layers = _layers(model)
    for layer in layers:
        _check(layer, what)
    config: Any = model.config
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    caches = {id(config): (config, config.use_cache) for config in configs if hasattr(config, "use_cache")}
    try:
        for config, _ in caches.values():
            config.use_cache = False
        for layer in layers:
            layer.ablation = what
        yield
    finally:
        for layer in layers:
            vars(layer).pop("ablation", None)
        for config, use_cache in caches.values():
            config.use_cache = use_cache


def _layers(model: PreTrainedModel) -> list[LinearAttention[Any]]:
    """The layers of a converted model in use. Raises `ConfigError` for another model, or one on softmax."""
    if not is_converted(model.config):
        raise ConfigError(
            f"ablated() needs a converted model; got {type(model).__name__}. "
            + (converted_parts(model).strip() or convert_first(model.config))
        )
    kind, active = kind_of(model), attention_of(model.config)
    if active != kind:
        raise ConfigError(
            f"ablated() needs a model that runs on its linear attention; got attn_implementation {active!r} of a model"
            f" converted to {kind!r}. Call model.set_attn_implementation({kind!r})."
        )
    return list(active_layers(model))


def possible_ablations(model: PreTrainedModel) -> list[str]:
    """The names that `ablated` takes for a converted model. Raises `ConfigError` as it does."""
    found = []
    for name in ABLATIONS:
        try:
            for layer in _layers(model):
                _check(layer, name)
        except UnsupportedError:
            continue
        found.append(name)
    return found


def check_whole(model: PreTrainedModel, caller: str) -> None:
    """Raise `ConfigError` if something is taken away from a model at present."""
    for module in model.modules():
        if isinstance(module, LinearAttention) and module.ablation is not None:
            raise ConfigError(f"{caller} reads whole layers: call it outside of ablated(model, {module.ablation!r}).")


def _check(layer: LinearAttention[Any], what: str) -> None:
    """Raise `UnsupportedError` if the layer has no such part."""
    config, declared = layer.config, get_kind(layer.kind)
    if layer.ablation is not None:
        raise UnsupportedError(f"This model is within ablated(model, {layer.ablation!r}) already. Leave that first.")
    if what == WINDOW_ALONE and not (config.window_size or config.num_global_tokens or config.num_heavy_keys):
        raise UnsupportedError(
            "'window_alone' needs something that is read exactly: a window, heavy keys or global tokens. This model"
            f" reads every key through slots (window_size={config.window_size!r})."
        )
    if what == SHUFFLED_SLOTS and getattr(config, declared.size_field) == 1 and not declared.needs_window:
        raise UnsupportedError(f"'shuffled_slots' needs at least two slots; got {declared.size_field}=1.")
