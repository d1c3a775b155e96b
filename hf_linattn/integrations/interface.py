"""The attention function of each kind: what a model calls instead of softmax attention.

Mask, causality, scaling and layer of a call are decided once and in one place (`resolve_call`); then exact or linear
attention is computed (`softmax_output`, `linear_output`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from ..modules.base import LinearAttention
from ..modules.registry import for_each_kind
from ..ops.tracing import known
from . import canary
from .cache import RecurrentLayer
from .call import Call, asks_cross, check_mask, check_prefix, disagreement, other_layer
from .checks import is_ordered, require_order, require_pattern, warn_attention_dropout
from .expected import changed
from .families import is_converted, read
from .hand_over import give_back
from .keywords import HARMLESS, check_keywords
from .layers import ATTRIBUTE, linear_layer
from .masks import linattn_mask
from .native import image_grid, native_attention
from .packing import Sequences, find_sequences, grouped_rows, padded_sequences
from .seams import ARGUMENT, attempt, default_scaling, register_attention, softmax_attention, softmax_name
from .token_mask import TokenMask, causal_key_mask, check_past_is_here, new_tokens

AttentionFunction = Callable[..., tuple[Tensor, None]]


def register_kinds() -> None:
    """Register every kind's name with Transformers, as an attention and as a mask function. Repeatable."""
    for_each_kind(_register)


def _register(kind: str) -> None:
    attempt(register_attention, kind, attention_function(kind), linattn_mask)


def attention_function(kind: str) -> AttentionFunction:
    """The function to register under a kind's name with `AttentionInterface`."""

    def attention(module: nn.Module, /, *inputs: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if torch.compiler.is_compiling():
            return kind_attention(kind, module, *inputs, **kwargs)
        if read(getattr(module, "config", None), "model_type") not in canary.passed:
            canary.check_model(module)  # before the arguments are looked at
        try:
            return kind_attention(kind, module, *inputs, **kwargs)
        except Exception:
            given = dict(zip(("query", "key"), inputs, strict=False)) | kwargs  # some models name all of them
            if "query" in given and "key" in given:
                give_back(module, key=given["key"], tokens=given["query"].shape[2])
            raise

    attention.__name__ = attention.__qualname__ = f"{kind}_attention"
    return attention


def kind_attention(
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
        kwargs: What the model passes on. `linattn_cache` is the cache of a layer with a state (`hand_over.hand_over`);
            key and value are then those of the new tokens.
    Returns: `([batch, queries, heads, head_dim], None)`.
    Raises: `InputError`, `UnsupportedError` and `UnsupportedTransformersError` where the result would be wrong; the
        message says what to do.
    """
    call = resolve_call(kind, module, query, key, value, attention_mask, scaling, dropout, kwargs)
    if call.on_softmax:
        return softmax_output(module, call), None
    if dropout:
        warn_attention_dropout(dropout)
    return linear_output(module, call), None


def resolve_call(
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    dropout: float,
    given: dict[str, Any],
) -> Call:
    """Check the arguments of an attention function and say what they ask for.

    Args:
        mask: What `linattn_mask` returned, or a tensor `[batch, tokens]`, True where a token is real.
        given: The other keyword arguments of the call.
    Raises: `InputError`, `UnsupportedError` and `UnsupportedTransformersError` where no kind could follow.
    """
    config = getattr(module, "config", None)
    cache = given.pop(ARGUMENT, None)
    if cache is not None:
        if not isinstance(cache, RecurrentLayer):
            raise InputError(
                f"{ARGUMENT!r} is a name of this library's own; got {type(cache).__name__}. Rename the key."
            )
        mask = new_tokens(mask, query.shape[2], cache.memory)
    says_packing = False
    for name in given:
        if name not in HARMLESS:
            says_packing = check_keywords(kind, module, given)
            break
    is_causal = causality(module, given)
    sizes = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    if torch.jit.is_tracing():
        sizes = known(sizes[0]), known(sizes[1]), known(sizes[2]), known(sizes[3])
    heads, key_heads, queries, keys = sizes
    made = mask
    if isinstance(made, TokenMask):
        asked = given.get("is_causal") is not None  # an encoder may be asked to be causal
        if made.is_causal not in (None, is_causal) and not (asked and is_causal):
            raise disagreement(module, is_causal)
        if is_causal and cache is None:
            check_past_is_here(made, keys)
        if not is_causal and made.tokens is None and made.shape[1] != keys:
            found = f"{keys} keys for a mask of {made.shape[1]} tokens from {type(module).__name__}"
            raise changed("attention modules", found)
        if made.pattern is not None and not says_packing:
            query = require_pattern(query, made)
        says_packing = says_packing or made.starts is not None
        if made.refusal is not None:
            raise UnsupportedError(made.refusal)
        mask = None if made.tokens is None else made.tokens.to(query.device)
    if mask is not None:
        check_mask(mask)

    layer = getattr(module, ATTRIBUTE, None)
    if layer is not None and not isinstance(layer, LinearAttention):
        layer = linear_layer(module)  # within what PEFT has put round it
    on_softmax = layer is None and is_converted(config)
    is_cross = layer is None and asks_cross(module, config, given, is_causal, queries == keys)
    if mask is not None and mask.shape[1] != keys:
        if not is_causal or not queries <= mask.shape[1] < keys:
            raise InputError(
                f"attention_mask must cover the {keys} keys; got {tuple(mask.shape)}. With past keys and values it"
                " covers past and new tokens, without them the new ones alone."
            )
        # A static cache has room for keys that it has not seen.
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    positions, sequences = given.get("position_ids"), None
    if positions is not None and not says_packing and not is_cross:
        in_order = is_ordered(positions, mask, queries)
        if in_order is None:
            query = require_order(query, made, positions, mask)
        says_packing = in_order is False
    if says_packing:
        sequences, query = find_sequences(given, made, query, keys, is_cross=is_cross, has_cache=cache is not None)
    elif mask is not None and cache is None and queries == keys and not (is_cross or on_softmax):
        sequences = padded_sequences(made, mask, query)
    if scaling is None:
        scaling = default_scaling(module, query.shape[-1])
    if queries != keys and not is_causal and not on_softmax:
        check_prefix(module, config, queries, keys, own_tokens=layer is not None or not is_cross)
    return Call(
        kind=kind,
        query=query,
        key=key,
        value=value,
        key_mask=mask,
        is_causal=is_causal,
        is_cross=is_cross,
        scaling=scaling,
        dropout=dropout,
        layer=layer,
        on_softmax=on_softmax,
        cache=cache,
        grid=given.get("grid"),
        group_size=heads // key_heads,
        sequences=sequences,
    )


def causality(module: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether a call of an attention function is causal: what the call says, else what the module does.

    Raises: `UnsupportedError` if neither says, or if the config contradicts the module.
    """
    is_causal = given.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
        config = getattr(module, "config", None)
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


def softmax_output(module: nn.Module, call: Call) -> Tensor:
    """Exact attention, what `attn_implementation="sdpa"` computes, `[batch, queries, heads, head_dim]`."""
    query, key_mask = call.query, call.key_mask
    if call.sequences is not None and call.sequences.is_packed:
        return _packed_softmax(module, call, call.sequences)
    queries, keys = query.shape[2], call.key.shape[2]
    mask = None
    if call.is_causal and (key_mask is not None or 1 < queries < keys):
        mask = causal_key_mask(queries, keys, key_mask, query.device)
    elif key_mask is not None:
        mask = key_mask[:, None, None, :].expand(-1, -1, queries, -1)
    return softmax_attention(
        module,
        query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        is_causal=call.is_causal,
    )


def _packed_softmax(module: nn.Module, call: Call, sequences: Sequences) -> Tensor:
    """The same for packed sequences, group by group."""
    rows = sequences.rows(call.query.device)
    assert rows is not None
    tokens = rows.split(call.query), rows.split(call.key), rows.split(call.value)
    parts = []
    for group, query, key, value in zip(rows.groups, *tokens, strict=True):
        own = replace(call, query=query, key=key, value=value, key_mask=group.real, sequences=None)
        parts.append(softmax_output(module, own).transpose(1, 2))
    return rows.join(parts).transpose(1, 2)


def linear_output(module: nn.Module, call: Call) -> Tensor:
    """Linear attention, of a converted layer or native: `[batch, queries, heads, head_dim]`.

    Raises: `UnsupportedError` where the converted layer is of another kind or direction, or where native mode needs
        what only a converted model can keep.
    """
    layer, query, key, value, mask = call.layer, call.query, call.key, call.value, call.key_mask
    if call.group_size > 1:
        key, value = key.repeat_interleave(call.group_size, dim=1), value.repeat_interleave(call.group_size, dim=1)
    if layer is None:
        output = native_attention(module, call, key, value)
    else:
        if layer.kind != call.kind or layer.shape.is_causal != call.is_causal:
            raise other_layer(module, layer, call)
        held: Any = module.linattn  # the layer, or what PEFT has put round it
        config: Any = module.config
        if call.cache is not None:
            output = call.cache.attend(held, query, key, value, mask, call.scaling)
        else:
            grid = _converted_grid(config, layer, key, call) if read(config, "image_size") is not None else None
            rows = None
            if call.sequences is not None and (call.sequences.is_packed or layer.takes_rows(grid)):
                rows = grouped_rows(call.sequences, layer.config, key, is_causal=call.is_causal)
            output = held(query, key, value, mask, scaling=call.scaling, grid=grid, rows=rows)
    return output.transpose(1, 2).contiguous()  # models take views of it


def _converted_grid(config: Any, layer: LinearAttention, key: Tensor, call: Call) -> tuple[int, int] | None:
    """Rows and columns of patches, when the tokens after the global ones are an image."""
    found = image_grid(config, key.shape[2], call.grid)
    return found[0] if found is not None and found[1] == layer.config.num_global_tokens else None
