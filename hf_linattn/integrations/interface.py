"""The attention function of each kind: what a model calls instead of softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from ..modules.registry import list_kinds
from ..ops.tracing import known
from .advice import softmax_name
from .attach import convert_otherwise
from .cache import RecurrentLayer
from .canary import check_model
from .checks import check_mask, check_positions, check_prefix, is_cross_attention, warn_attention_dropout
from .expected import changed
from .families import family_of, is_converted
from .graph_checks import require_order, require_pattern
from .keywords import check_keywords
from .layers import linear_layer
from .masks import linattn_mask
from .native import image_grid, native_attention
from .seams import ARGUMENT, attempt, check_scaling, register_attention, softmax_attention
from .token_mask import TokenMask, causal_key_mask, check_past_is_here, new_tokens, token_mask
from .undo import give_back

AttentionFunction = Callable[..., tuple[Tensor, None]]


def register_kinds() -> None:
    """Register every kind's name with Transformers, as an attention and as a mask function. Repeatable."""
    for kind in list_kinds():
        attempt(register_attention, kind, attention_function(kind), linattn_mask)


def attention_function(kind: str) -> AttentionFunction:
    """The function to register under a kind's name with `AttentionInterface`."""

    def attention(module: nn.Module, /, *inputs: Any, **kwargs: Any) -> tuple[Tensor, None]:
        check_model(module)  # before the arguments are looked at
        if torch.compiler.is_compiling():
            return attend(kind, module, *inputs, **kwargs)
        try:
            return attend(kind, module, *inputs, **kwargs)
        except Exception:
            given = dict(zip(("query", "key"), inputs, strict=False)) | kwargs  # some models name all of them
            if "query" in given and "key" in given:
                give_back(module, key=given["key"], tokens=given["query"].shape[2])
            raise

    attention.__name__ = attention.__qualname__ = f"{kind}_attention"
    return attention


def attend(
    kind: str,
    module: nn.Module,
    /,  # a batch may have keys of these names
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer of a stock or converted model, by the contract of Transformers' AttentionInterface.

    Args:
        module: The model's attention module, with `config`, and `linattn` if it has been converted.
        query: `[batch, heads, queries, head_dim]`; in a causal layer the last ones of the keys' tokens.
        key, value: `[batch, key/value heads, keys, head_dim]`.
        attention_mask: What `linattn_mask` returned, or a tensor `[batch, tokens]`, True where a token is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        dropout: Attention dropout; honoured by layers left on softmax, otherwise one warning.
        kwargs: What the model passes on. `linattn_cache` is the cache of a layer with a state (`cache.hand_over`);
            key and value are then those of the new tokens.
    Returns: `([batch, queries, heads, head_dim], None)`.
    Raises: `InputError`, `UnsupportedError` and `UnsupportedTransformersError` where the result would be wrong; the
        message says what to do.
    """
    recurrent: RecurrentLayer | None = kwargs.pop(ARGUMENT, None)
    if recurrent is not None and not isinstance(recurrent, RecurrentLayer):
        raise InputError(
            f"{ARGUMENT!r} is a name of this library's own; got {type(recurrent).__name__}. Rename the key."
        )
    if recurrent is not None:
        attention_mask = new_tokens(attention_mask, query.shape[2], recurrent.memory)
    check_keywords(kind, module, kwargs)
    config = getattr(module, "config", None)
    is_causal = causality(module, kwargs)
    _check_agreement(module, attention_mask, is_causal, asked=kwargs.get("is_causal") is not None)
    if is_causal and recurrent is None:
        check_past_is_here(attention_mask, key.shape[2])
    is_unpadded = isinstance(attention_mask, TokenMask) and attention_mask.tokens is None  # others are checked below
    if not is_causal and is_unpadded and attention_mask.shape[1] != key.shape[2]:
        found = f"{key.shape[2]} keys for a mask of {attention_mask.shape[1]} tokens from {type(module).__name__}"
        raise changed("attention modules", found)
    query = require_pattern(query, attention_mask)
    given, attention_mask = attention_mask, token_mask(attention_mask, query.device)
    check_mask(attention_mask)
    cross = is_cross_attention(module, config, kwargs, is_causal=is_causal, same_length=query.shape[2] == key.shape[2])
    key, value, mask = _match_keys(key, value, attention_mask, query.shape[2], is_causal=is_causal)
    position_ids: Any = kwargs.get("position_ids")
    if not cross and check_positions(position_ids, mask, query.shape[2]):
        query = require_order(query, given, position_ids, mask)
    scaling = check_scaling(module, scaling, query.shape[-1])

    layer = linear_layer(module)
    if layer is None and is_converted(config):
        return _softmax(module, query, key, value, mask, scaling=scaling, dropout=dropout, is_causal=is_causal)
    if not is_causal:
        own_tokens = layer is not None or not cross
        check_prefix(module, config, queries=query.shape[2], keys=key.shape[2], own_tokens=own_tokens)
    warn_attention_dropout(dropout)
    key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    if layer is not None:
        if layer.kind != kind:
            raise UnsupportedError(
                f"This layer was converted to {layer.kind!r}, but the active attn_implementation is {kind!r}. Call "
                f"set_attn_implementation({layer.kind!r}), or revert the model (`hf_linattn.revert`) and convert it "
                f"to {kind!r}."
            )
        if layer.shape.is_causal != is_causal:
            raise UnsupportedError(
                f"This layer was converted with is_causal={layer.shape.is_causal}; got is_causal={is_causal}. "
                f"{convert_otherwise(config, is_causal)}"
            )
        held: Any = module.linattn  # the layer, or what PEFT has put round it
        if recurrent is not None:
            return recurrent.attend(held, query, key, value, mask, scaling).transpose(1, 2).contiguous(), None
        output = held(query, key, value, mask, scaling=scaling, grid=_converted_grid(module, layer, key, kwargs))
    else:
        output = native_attention(
            kind,
            module,
            query,
            key,
            value,
            mask,
            scaling=scaling,
            is_causal=is_causal,
            cross=cross,
            grid=kwargs.get("grid"),
        )
    return output.transpose(1, 2).contiguous(), None  # models take views of it


def causality(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an attention function is causal: what the call says, else what the module does.

    Raises: `UnsupportedError` if neither says, or if the config contradicts the module.
    """
    config = getattr(module, "config", None)
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
        if is_causal is None:
            raise UnsupportedError(
                f"{type(module).__name__} does not say whether it is causal (no attribute `is_causal`), and guessing "
                "could let a token see later ones. Set `is_causal` on the attention modules, or use "
                f"attn_implementation={softmax_name(config)!r}."
            )
        if is_causal and getattr(config, "is_causal", True) is False:
            raise UnsupportedError(
                f"config.is_causal is False, but {type(module).__name__} is causal. Pass is_causal=False to the "
                "model, or set it on its attention modules."
            )
    return bool(is_causal)


def _check_agreement(module: nn.Module, mask: Any, is_causal: bool, *, asked: bool) -> None:
    """Raise if the mask that the model made and its attention module do not mean the same direction.

    Args:
        asked: Whether `is_causal` is an argument of the call: an encoder may be asked to be causal.
    """
    told = mask.is_causal if isinstance(mask, TokenMask) else None
    if told is None or told == is_causal or (asked and is_causal):
        return
    words = {True: "causal", False: "bidirectional"}
    raise UnsupportedError(
        f"The model made a {words[told]} attention mask, but {type(module).__name__} computes {words[is_causal]} "
        "attention: a token would see too much or too little. Set is_causal (of a BERT: is_decoder) in the config "
        f"before the model is made, or use attn_implementation={softmax_name(getattr(module, 'config', None))!r}, "
        "where the mask decides."
    )


def _match_keys(
    key: Tensor, value: Tensor, mask: Tensor | None, query_tokens: int, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Drop keys that a static cache has room for but has not seen, recognised by a mask shorter than the keys."""
    keys = key.shape[2]
    if mask is None or mask.shape[1] == keys:
        return key, value, mask
    if not is_causal or not query_tokens <= mask.shape[1] < keys:
        raise InputError(
            f"attention_mask must cover the {keys} keys; got {tuple(mask.shape)}. With past keys and values it covers "
            "past and new tokens, without them the new ones alone."
        )
    return key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]], mask


def _repeat_heads(query: Tensor, states: Tensor) -> Tensor:
    """Grouped-query attention: give every query head its own copy of its group's keys or values."""
    repeats = known(query.shape[1]) // known(states.shape[1])
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def _softmax(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    is_causal: bool,
) -> tuple[Tensor, None]:
    """Exact attention of a layer that was not converted: what `attn_implementation="sdpa"` computes."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if is_causal and (key_mask is not None or 1 < queries < keys):
        mask = causal_key_mask(queries, keys, key_mask, query.device)
    elif key_mask is not None:
        mask = key_mask[:, None, None, :].expand(-1, -1, queries, -1)
    output = softmax_attention(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal)
    return output, None


def _converted_grid(module: nn.Module, layer: Any, key: Tensor, kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of patches, when the tokens after the global ones are an image."""
    if family_of(module.config, is_causal=layer.shape.is_causal) != "vit":
        return None
    found = image_grid(module.config, key.shape[2], kwargs.get("grid"))
    return found[0] if found is not None and found[1] == layer.config.num_global_tokens else None
