"""After an error in the attention function: the cache gives back the tokens of the call that was refused.

A model hands keys and values to its cache before it calls the attention function. Without this a caller who mends his
call and tries again with the same cache would have the refused tokens in it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from .cache import RecurrentLayer
from .seams import EncoderDecoderCache, calling_cache, shorten


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
    tokens, nothing changes: that cannot be undone, and the next call with the cache raises (`cache.hand_over`).

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
        last.retract()
    else:
        before.append(last)
    for place, layer in enumerate(before):
        if not isinstance(layer, SpoiltLayer) and not shorten(layer, tokens):
            layers[place] = SpoiltLayer()
