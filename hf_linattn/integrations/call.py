"""One call of an attention function, all of it decided (`interface.resolve_call`), and what of a call is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from ..modules.base import LinearAttention
from .attach import convert_otherwise
from .cache import RecurrentLayer
from .families import read
from .packing import Sequences
from .seams import softmax_name


@dataclass(eq=False)  # not frozen, which takes longer to make
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
        sequences: What is taken apart, sequence by sequence: a packed batch, or a padded one, whose `key_mask` says
            the same. `None`: neither.
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
    sequences: Sequences | None = None


def disagreement(module: nn.Module, is_causal: bool) -> UnsupportedError:
    """The mask that the model made and its attention module do not mean the same direction."""
    module_is, mask_is = ("causal", "bidirectional") if is_causal else ("bidirectional", "causal")
    return UnsupportedError(
        f"The model made a {mask_is} attention mask, but {type(module).__name__} computes {module_is} attention: a "
        "token would see too much or too little. Set is_causal (of a BERT: is_decoder) in the config before the model "
        f"is made, or use attn_implementation={softmax_name(getattr(module, 'config', None))!r}, where the mask "
        "decides."
    )


def attribute(module: nn.Module, name: str) -> Any:
    """`getattr(module, name, None)` of what is no parameter, buffer or module: torch looks for those at length."""
    own = module.__dict__
    return own[name] if name in own else getattr(module, name, None) if hasattr(type(module), name) else None


def other_layer(module: nn.Module, layer: LinearAttention, call: Call) -> UnsupportedError:
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


def check_mask(mask: Any) -> None:
    """Raise `InputError` for a mask over query-key pairs, which bypasses the mask function."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = f"{mask.ndim}-D {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask must be 2-D, [batch, tokens] with 1 where a token is real; got {shape}. A linear "
            "attention kind cannot hide single query-key pairs: pass the padding mask, or use "
            "attn_implementation='sdpa'."
        )


def asks_cross(module: nn.Module, config: Any, given: Mapping[str, Any], is_causal: bool, same_length: bool) -> bool:
    """Whether queries and keys come from different sequences.

    Raises `UnsupportedError` where a module of an encoder-decoder model does not let one tell.
    """
    declared = attribute(module, "is_cross_attention")
    if declared is not None:
        return bool(declared)
    if is_causal or attribute(module, "is_causal"):  # or asked to be bidirectional, by the config or the call
        return False
    if given.get("encoder_hidden_states") is not None or not same_length:
        return True
    if read(config, "add_cross_attention"):
        return True  # a decoder's self-attention is causal, so this is its other attention
    is_decoder = attribute(module, "is_decoder")
    if read(config, "is_encoder_decoder") and is_decoder is None:
        raise UnsupportedError(
            f"{type(module).__name__} of an encoder-decoder model does not say whether it attends to its own sequence "
            "or to the encoder's. Use attn_implementation='sdpa' for this model."
        )
    return bool(is_decoder)


def check_prefix(module: nn.Module, config: Any, queries: int, keys: int, *, own_tokens: bool) -> None:
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
