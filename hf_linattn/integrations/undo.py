"""After an error in the attention function: the cache gives back the tokens of the call that was refused.

A model hands keys and values to its cache before it calls the attention function. Without this a caller who mends his
call and tries again with the same cache would have the refused tokens in it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cache import RecurrentLayer
from .seams import EncoderDecoderCache, calling_cache, shorten


def give_back(key: Tensor, tokens: int) -> None:
    """Take the tokens of the call in progress out of the cache layers that have them.

    Where a layer with a state has read them, nothing changes: that cannot be undone, and the next call with the cache
    raises (`cache.hand_over`).

    Args:
        key: Keys that the attention function was given, `[batch, heads, keys, head_dim]`.
        tokens: How many of them are new.
    """
    cache = calling_cache()
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    taken: list[Any] = []
    for layer in getattr(cache, "layers", ()):
        taken.append(layer)
        if isinstance(layer, RecurrentLayer):
            if not layer.is_pending:
                return
            break
        if getattr(layer, "keys", None) is key:
            break
    else:
        return  # another cache, or a layer that does not update it
    for layer in taken:
        if isinstance(layer, RecurrentLayer):
            layer.retract()
        else:
            shorten(layer, tokens)
