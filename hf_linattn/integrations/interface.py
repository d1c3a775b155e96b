"""The attention function of each kind: what a model calls instead of softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..modules.base import LinearAttention
from ..modules.registry import for_each_kind
from .attach import convert_otherwise
from .call import Call, resolve_call
from .canary import check_model
from .checks import warn_attention_dropout
from .hand_over import give_back
from .masks import linattn_mask
from .native import image_grid, native_attention
from .seams import attempt, register_attention, softmax_attention
from .token_mask import causal_key_mask

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
        check_model(module)  # before the arguments are looked at
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


def softmax_output(module: nn.Module, call: Call) -> Tensor:
    """Exact attention, what `attn_implementation="sdpa"` computes, `[batch, queries, heads, head_dim]`."""
    query, key_mask = call.query, call.key_mask
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
            raise _other_layer(module, layer, call)
        held: Any = module.linattn  # the layer, or what PEFT has put round it
        config: Any = module.config
        if call.cache is not None:
            output = call.cache.attend(held, query, key, value, mask, call.scaling)
        else:
            grid = _converted_grid(config, layer, key, call) if config.model_type == "linattn_vit" else None
            output = held(query, key, value, mask, scaling=call.scaling, grid=grid)
    return output.transpose(1, 2).contiguous()  # models take views of it


def _other_layer(module: nn.Module, layer: LinearAttention, call: Call) -> UnsupportedError:
    """A converted layer is of another kind, or of the other direction, than the call asks for."""
    if layer.kind != call.kind:
        return UnsupportedError(
            f"This layer was converted to {layer.kind!r}, but the active attn_implementation is {call.kind!r}. Call "
            f"set_attn_implementation({layer.kind!r}), or revert the model (`hf_linattn.revert`) and convert it "
            f"to {call.kind!r}."
        )
    return UnsupportedError(
        f"This layer was converted with is_causal={layer.shape.is_causal}; got is_causal={call.is_causal}. "
        f"{convert_otherwise(module.config, call.is_causal)}"
    )


def _converted_grid(config: Any, layer: LinearAttention, key: Tensor, call: Call) -> tuple[int, int] | None:
    """Rows and columns of patches, when the tokens after the global ones are an image."""
    found = image_grid(config, key.shape[2], call.grid)
    return found[0] if found is not None and found[1] == layer.config.num_global_tokens else None
