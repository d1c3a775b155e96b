"""What one call of an attention function asks for: mask, causality and scaling, decided once and in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from ..modules.base import LinearAttention
from ..ops.tracing import known
from .cache import RecurrentLayer
from .checks import NO_PATTERN, check_positions, require, require_order
from .expected import changed
from .families import is_converted
from .keywords import check_keywords
from .layers import linear_layer
from .seams import ARGUMENT, default_scaling, softmax_name
from .token_mask import TokenMask, check_past_is_here, new_tokens


@dataclass(frozen=True)
class Call:
    """One call of an attention function, all of it decided.

    Args:
        kind: Name of the active kind.
        query: `[batch, heads, queries, head_dim]`; in a causal call the last ones of the keys' tokens.
        key, value: `[batch, key/value heads, keys, head_dim]`; with a `cache` those of the new tokens.
        key_mask: `[batch, keys]` bool, True where a token is real; `None`: all are.
        is_causal: Whether a token sees those up to itself only.
        is_cross: Whether queries and keys are of different sequences.
        scaling: Factor of the dot product.
        dropout: Probability of attention dropout, which only softmax can follow.
        layer: The linear attention of a converted layer; `None` in native mode and under softmax.
        on_softmax: Whether this is a layer of a converted model that conversion left on softmax.
        cache: The cache of a layer that keeps a state of what it has seen.
        grid: Rows and columns of patches, where the model says so.
        group_size: Heads of the query that share a head of key and value (grouped-query attention).
    """

    kind: str
    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    is_causal: bool
    is_cross: bool
    scaling: float
    dropout: float
    layer: LinearAttention | None
    on_softmax: bool
    cache: RecurrentLayer | None
    grid: tuple[int, int] | None
    group_size: int


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
    check_keywords(kind, module, given)
    is_causal = causality(module, given)
    sizes = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    if torch.jit.is_tracing():
        sizes = known(sizes[0]), known(sizes[1]), known(sizes[2]), known(sizes[3])
    heads, key_heads, queries, keys = sizes
    made = mask
    if isinstance(made, TokenMask):
        asked = given.get("is_causal") is not None  # an encoder may be asked to be causal
        if made.is_causal not in (None, is_causal) and not (asked and is_causal):
            raise _disagreement(module, is_causal)
        if is_causal and cache is None:
            check_past_is_here(made, keys)
        if not is_causal and made.tokens is None and made.shape[1] != keys:
            found = f"{keys} keys for a mask of {made.shape[1]} tokens from {type(module).__name__}"
            raise changed("attention modules", found)
        if made.pattern is not None:
            query = require(query, made.pattern, NO_PATTERN)
        if made.refusal is not None:
            raise UnsupportedError(made.refusal)
        mask = None if made.tokens is None else made.tokens.to(query.device)
    if mask is not None:
        _check_mask(mask)

    layer = linear_layer(module)
    on_softmax = layer is None and is_converted(config)
    is_cross = layer is None and _is_cross(module, config, given, is_causal, queries == keys)
    if mask is not None and mask.shape[1] != keys:
        if not is_causal or not queries <= mask.shape[1] < keys:
            raise InputError(
                f"attention_mask must cover the {keys} keys; got {tuple(mask.shape)}. With past keys and values it"
                " covers past and new tokens, without them the new ones alone."
            )
        # A static cache has room for keys that it has not seen.
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    positions = given.get("position_ids")
    if positions is not None and not is_cross and check_positions(positions, mask, queries):
        query = require_order(query, made, positions, mask)
    if scaling is None:
        scaling = default_scaling(module, query.shape[-1])
    if queries != keys and not is_causal and not on_softmax:
        _check_prefix(module, config, queries, keys, own_tokens=layer is not None or not is_cross)
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


def _disagreement(module: nn.Module, is_causal: bool) -> UnsupportedError:
    """The mask that the model made and its attention module do not mean the same direction."""
    module_is, mask_is = ("causal", "bidirectional") if is_causal else ("bidirectional", "causal")
    return UnsupportedError(
        f"The model made a {mask_is} attention mask, but {type(module).__name__} computes {module_is} attention: a "
        "token would see too much or too little. Set is_causal (of a BERT: is_decoder) in the config before the model "
        f"is made, or use attn_implementation={softmax_name(getattr(module, 'config', None))!r}, where the mask "
        "decides."
    )


def _check_mask(mask: Any) -> None:
    """Raise `InputError` for a mask over query-key pairs, which bypasses the mask function."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = f"{mask.ndim}-D {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask must be 2-D, [batch, tokens] with 1 where a token is real; got {shape}. A linear "
            "attention kind cannot hide single query-key pairs: pass the padding mask, or use "
            "attn_implementation='sdpa'."
        )


def _is_cross(module: nn.Module, config: Any, given: Mapping[str, Any], is_causal: bool, same_length: bool) -> bool:
    """Whether queries and keys come from different sequences.

    Raises `UnsupportedError` where a module of an encoder-decoder model does not let one tell.
    """
    declared = getattr(module, "is_cross_attention", None)
    if declared is not None:
        return bool(declared)
    if is_causal or getattr(module, "is_causal", False):  # or asked to be bidirectional, by the config or the call
        return False
    if given.get("encoder_hidden_states") is not None or not same_length:
        return True
    if getattr(config, "add_cross_attention", False):
        return True  # a decoder's self-attention is causal, so this is its other attention
    is_decoder = getattr(module, "is_decoder", None)
    if getattr(config, "is_encoder_decoder", False) and is_decoder is None:
        raise UnsupportedError(
            f"{type(module).__name__} of an encoder-decoder model does not say whether it attends to its own sequence "
            "or to the encoder's. Use attn_implementation='sdpa' for this model."
        )
    return bool(is_decoder)


def _check_prefix(module: nn.Module, config: Any, queries: int, keys: int, *, own_tokens: bool) -> None:
    """Raise `UnsupportedError` for keys from before the tokens of a bidirectional layer: a cache, or prefix tuning.

    Args:
        own_tokens: Whether the layer is known to attend to its own tokens. A converted one always does.
    """
    is_encoder = getattr(module, "is_decoder", None) is False and not getattr(config, "add_cross_attention", False)
    if own_tokens or is_encoder:
        raise UnsupportedError(
            "A bidirectional layer with linear attention has no keys but those of its own tokens, which past keys and "
            f"values add to: got {keys} keys for {queries} queries. Pass all tokens at once, without a cache "
            "(use_cache=False). In place of prefix tuning use virtual tokens in the input (PEFT: PromptTuningConfig, "
            "PromptEncoderConfig) or an adapter of the weights (LoraConfig), or keep attn_implementation='sdpa'."
        )
