"""Which layers have a cache of ours, how it gets to their attention function, and how it is mended after an error.

A model hands keys and values to its cache before it calls the attention function, and does not give the cache to the
latter; `hand_over`, a hook of the attention module, does. If the call is refused, the cache has the tokens already:
`give_back` takes them out, or a caller who mends the call and tries again with the same cache would have them twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..modules.recorded import is_traced
from ..modules.registry import get_kind
from .cache import RecurrentLayer, StaticRecurrentLayer
from .families import defaults_family, is_causal_model
from .layers import linear_layer
from .seams import (
    ARGUMENT,
    LAYER_TYPE,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
    attention_of,
    calling_cache,
    find_cache,
    shorten,
)
from .settings import parse_settings


def cache_layer_types(config: Any) -> list[str] | None:
    """Type of each layer's cache for a converted model's config; `None` if no layer keeps a state."""
    value = getattr(config, "linear_attention", None)
    # In a graph that is run for other inputs later, no state of this call is of use: all keys and values are kept.
    if value is None or not is_causal_model(config) or attention_of(config) != value["kind"] or is_traced():
        return None
    settings = parse_settings(value, family=defaults_family(config))
    if not get_kind(value["kind"]).module_cls.supports_recurrence(settings.config, is_causal=True):
        return None
    layers, ours = range(config.num_hidden_layers), settings.layers
    if ours is not None and ours[-1] not in layers:
        return None  # a model that drafts for itself (early exit): fewer layers in its config than it has
    return [LAYER_TYPE if ours is None or index in ours else "full_attention" for index in layers]


def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a converted attention module: give its cache layer, if it is ours, to the attention."""
    cache = find_cache(args, kwargs)
    index = getattr(module, "layer_idx", None)
    if cache is None or index is None:
        return None
    if isinstance(cache, EncoderDecoderCache):
        _keep_encoder(cache, index)
        cache = cache.self_attention_cache
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    if not isinstance(layer, RecurrentLayer):
        return None
    if not torch.compiler.is_compiling() and not any(isinstance(other, RecurrentLayer) for other in layers[:index]):
        _check_in_step(layers[index:])
    active, own = attention_of(module.config), linear_layer(module).kind  # type: ignore[union-attr]
    if active != own:
        raise UnsupportedError(
            f"This cache holds the state of {own!r} attention, and the active attn_implementation is {active!r}, which"
            f" needs the keys and values of all tokens. Call set_attn_implementation({own!r}), or start with a new"
            " cache."
        )
    if layer.is_sliding and not torch.compiler.is_compiling() and all(isinstance(o, RecurrentLayer) for o in layers):
        # A cache that offloads all layers but sliding ones looks for one to offload, and fails if all say they slide.
        for other in layers:
            other.is_sliding = False
    layer.is_expected = True
    return args, {**kwargs, ARGUMENT: layer}


def _check_in_step(rest: Any) -> None:
    """Raise if layers that a forward pass has yet to come to have seen other tokens than the one it has come to."""
    lengths = [layer.get_seq_length() for layer in rest]
    if isinstance(lengths[0], int) and len(set(lengths)) > 1:
        raise UnsupportedError(
            f"The layers of this cache have seen {lengths} tokens: a forward pass was interrupted, and what some"
            " layers have absorbed cannot be taken back. Start with a new cache."
        )


def _keep_encoder(cache: EncoderDecoderCache, index: int) -> None:
    """Cross-attention stays on softmax, with a cache of keys and values; Transformers makes both alike."""
    layers = cache.cross_attention_cache.layers
    if index < len(layers) and isinstance(layers[index], RecurrentLayer):
        layer = layers[index]
        is_static = isinstance(layer, StaticRecurrentLayer)
        layers[index] = StaticLayer(max_cache_len=layer.max_cache_len) if is_static else DynamicLayer()


def add_hook(module: nn.Module) -> None:
    """Let a converted attention module find its cache layer."""
    remove_hook(module)
    module.register_forward_pre_hook(hand_over, with_kwargs=True)


def remove_hook(module: nn.Module) -> None:
    """Undo `add_hook`. By the function, not by a handle, which would not survive a copy of the model."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is hand_over:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


# -- after an error in the attention function -----------------------------------------------------------------------
class SpoiltLayer:
    """In place of a cache layer that could not give its tokens back: whatever asks it is told so."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedError(
            "An earlier call with this cache was refused after the cache had taken its tokens in, and a cache of this"
            " sort cannot give them back. Start with a new cache."
        )


def give_back(module: nn.Module, key: Tensor, tokens: int) -> None:
    """Take the tokens of the call in progress out of the cache layers that have them.

    A cache layer that has no way to do so is replaced by one that raises. Where a layer with a state has read the
    tokens, nothing changes: that cannot be undone, and the next call with the cache raises (`hand_over`).

    Args:
        module: The attention module whose call of the attention function was refused. Modules before it in the model
            have updated their layers of the cache.
        key: Keys that the attention function was given, `[batch, heads, keys, head_dim]`.
        tokens: How many of them are new.
    """
    cache = calling_cache()
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = getattr(cache, "layers", [])
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        index = next((i for i, layer in enumerate(layers) if getattr(layer, "keys", None) is key), len(layers))
    if index >= len(layers):
        return  # another cache, or a module that does not update it
    *before, last = layers[: index + 1]
    if any(isinstance(layer, RecurrentLayer) for layer in before):
        return
    if isinstance(last, RecurrentLayer):
        if not last.is_pending:
            return
        last.is_pending = False  # the call was refused before anything was read
    else:
        before.append(last)
    for place, layer in enumerate(before):
        if not isinstance(layer, SpoiltLayer) and not shorten(layer, tokens):
            layers[place] = SpoiltLayer()
