"""What an attention function may be given, and what it must refuse because the result would be wrong."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from .graph_checks import PACKED, out_of_order
from .seams import is_tracing


def check_mask(mask: Any) -> None:
    """Raise `InputError` for a mask over query-key pairs, which bypasses the mask function."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = f"{mask.ndim}-D {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask must be 2-D, [batch, tokens] with 1 where a token is real; got {shape}. A linear "
            "attention kind cannot hide single query-key pairs: pass the padding mask, or use "
            "attn_implementation='sdpa'."
        )


# The position_ids found in order last and the mask they were checked with, each with its version: every layer of a
# forward gets the same tensors. Replaced as a whole, so that threads may share it.
_Seen = tuple[weakref.ref[Tensor], int]
_last_checked: tuple[_Seen, _Seen | None] | None = None


def _is_seen(tensor: Tensor | None, seen: _Seen | None) -> bool:
    if tensor is None or seen is None:
        return tensor is None and seen is None
    return seen[0]() is tensor and seen[1] == tensor._version


def check_positions(position_ids: Any, key_mask: Tensor | None, query_tokens: int) -> bool:
    """Raise `InputError` if the positions of a row's real tokens do not increase, as in packed sequences.

    Returns: whether that is left to the graph that is being made (`graph_checks.require_order`): while tracing
        (`torch.compile`, export, `torch.jit.trace`) the values are not there.
    """
    global _last_checked
    if position_ids is None or query_tokens == 1 or not isinstance(position_ids, Tensor) or position_ids.is_meta:
        return False
    if position_ids.ndim != 2 or position_ids.shape[1] != query_tokens:
        raise InputError(
            f"position_ids must be [batch, tokens] with {query_tokens} tokens; got {tuple(position_ids.shape)}. Pass "
            "them in this shape; a model that hands others to its layers works with attn_implementation='sdpa'."
        )
    if is_tracing(position_ids):
        return True
    last = _last_checked
    versioned = not any(tensor.is_inference() for tensor in (position_ids, key_mask) if tensor is not None)
    if versioned and last is not None and _is_seen(position_ids, last[0]) and _is_seen(key_mask, last[1]):
        return False
    wrong = out_of_order(position_ids, key_mask, query_tokens)
    if bool(wrong.any()):
        row = int(wrong.any(-1).nonzero()[0])
        positions = position_ids.expand(wrong.shape[0], -1)
        raise InputError(
            f"position_ids must increase along the real tokens of a row; row {row} has "
            f"{positions[row].tolist()[:16]}. {PACKED}"
        )
    if versioned:
        seen_mask = None if key_mask is None else (weakref.ref(key_mask), key_mask._version)
        _last_checked = ((weakref.ref(position_ids), position_ids._version), seen_mask)
    return False


def is_cross_attention(
    module: nn.Module, config: Any, kwargs: Mapping[str, Any], *, is_causal: bool, same_length: bool
) -> bool:
    """Whether queries and keys come from different sequences.

    Raises `UnsupportedError` where a module of an encoder-decoder model does not let one tell.
    """
    declared = getattr(module, "is_cross_attention", None)
    if declared is not None:
        return bool(declared)
    if is_causal or getattr(module, "is_causal", False):  # or asked to be bidirectional, by the config or the call
        return False
    if kwargs.get("encoder_hidden_states") is not None or not same_length:
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


def check_prefix(module: nn.Module, config: Any, *, queries: int, keys: int, own_tokens: bool) -> None:
    """Raise `UnsupportedError` for keys from before the tokens of a bidirectional layer: a cache, or prefix tuning.

    Args:
        own_tokens: Whether the layer is known to attend to its own tokens. A converted one always does.
    """
    encoder = getattr(module, "is_decoder", None) is False and not getattr(config, "add_cross_attention", False)
    if queries != keys and (own_tokens or encoder):
        raise UnsupportedError(
            "A bidirectional layer with linear attention has no keys but those of its own tokens, which past keys and "
            f"values add to: got {keys} keys for {queries} queries. Pass all tokens at once, without a cache "
            "(use_cache=False). In place of prefix tuning use virtual tokens in the input (PEFT: PromptTuningConfig, "
            "PromptEncoderConfig) or an adapter of the weights (LoraConfig), or keep attn_implementation='sdpa'."
        )


_dropout_warned = False


def warn_attention_dropout(probability: float) -> None:
    """Say once per process that attention dropout is not applied."""
    global _dropout_warned
    if _dropout_warned or not probability or torch.compiler.is_compiling():
        return
    _dropout_warned = True
    warnings.warn(
        f"Attention dropout (p={probability}) is not applied by a linear attention kind: there are no attention "
        "weights to drop. Set it to 0 in the model's config (conversion does), and use `slot_dropout` in the kind's "
        "settings instead.",
        UserWarning,
        stacklevel=2,
    )
