"""How caches are tried out: what the container does with our layers in it, and with those of keys and values."""

from __future__ import annotations

from typing import Any

import torch

from . import seams
from .expected import expects
from .probes import tiny_config


def _layers(cache: Any) -> str | None:
    found = [type(layer).__name__ for layer in cache.layers]
    return None if [hasattr(layer, "memory") for layer in cache.layers] == [True, False] else f"layers {found}"


_MIXED = [seams.LAYER_TYPE, "full_attention"]


@expects("DynamicCache(config) to make the cache layers that config.layer_types names")
def dynamic_cache() -> str | None:
    return _layers(seams.DynamicCache(config=tiny_config(_MIXED)))


@expects("StaticCache(config, max_cache_len) to make the cache layers that config.layer_types names")
def static_cache() -> str | None:
    if not seams.has_static_layer_types():
        return None
    return _layers(seams.StaticCache(config=tiny_config(_MIXED), max_cache_len=4))


@expects(
    "a Cache to pass update, get_seq_length, get_mask_sizes, crop, reset, reorder_cache, batch_select_indices and "
    "batch_repeat_interleave on to its layers"
)
def cache_layers() -> str | None:
    cache = seams.DynamicCache(config=tiny_config(_MIXED))
    layer, keys = cache.layers[0], torch.zeros(1, 1, 3, 2)
    if cache.is_compileable or not cache.is_sliding[0]:
        return f"is_compileable {cache.is_compileable} and is_sliding {cache.is_sliding}"
    layer.is_expected = True
    if cache.update(keys, keys, 0)[0] is not keys:
        return "other keys from update than those of the layer"
    layer.seen = 5
    sizes = int(cache.get_seq_length()), cache.get_mask_sizes(3, 0)
    if sizes != (5, (3, 5)):
        return f"get_seq_length and get_mask_sizes {sizes}"
    del cache.layers[1:]
    mask = seams.causal_mask(tiny_config(_MIXED[:1] * 2), torch.zeros(1, 3, 2), None, cache)
    if getattr(mask, "shape", None) != (1, 3) or not mask.follows:
        return f"a mask {getattr(mask, 'shape', mask)} for 3 tokens after 5"
    mixed = seams.DynamicCache(config=tiny_config(_MIXED))
    mixed.layers[0].seen = 5
    mixed.layers[1].update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2))
    padding = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0]])
    mask = seams.causal_mask(tiny_config(_MIXED), torch.zeros(1, 3, 2), padding, mixed)
    if getattr(mask, "shape", None) != (1, 8) or mask.tokens.tolist() != padding.bool().tolist():
        return f"a mask {getattr(mask, 'shape', mask)} for 3 tokens after 5 where a layer keeps keys"
    return _passed_on(cache)


def _passed_on(cache: Any) -> str | None:
    """What the container does with the calls of `generate`."""
    calls: list[str] = []
    names = ["reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset"]
    optional = ["activate_past_recording"]  # unknown to older releases

    class Spy(type(cache.layers[0])):  # type: ignore[misc]
        def get_max_length(self) -> int:
            return -1

    for name in names + optional:
        setattr(Spy, name, lambda self, *args, name=name, **kwargs: calls.append(name))
    stock = seams.DynamicLayer()
    stock.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    stock.crop(-1)
    if int(stock.get_seq_length()) != 2:
        return f"{stock.get_seq_length()} of 3 tokens after crop(-1)"
    cache.layers = [Spy()]
    index = torch.zeros(1, dtype=torch.long)
    cache.reorder_cache(index)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(index)
    cache.crop(-1)
    cache.reset()
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
        names += optional
    return None if calls == names else f"the layer told to {calls}"


@expects("EncoderDecoderCache to hold self_attention_cache and cross_attention_cache")
def encoder_decoder_cache() -> str | None:
    own, other = (seams.DynamicCache(config=tiny_config()) for _ in range(2))
    cache = seams.EncoderDecoderCache(own, other)
    if not isinstance(cache, seams.Cache):
        return "it is no Cache"
    if cache.self_attention_cache is not own or cache.cross_attention_cache is not other:
        return "other caches in it than those given"
    seams.DynamicLayer(), seams.StaticLayer(max_cache_len=2)
    return None
