"""What an attention function may be given, and what it must refuse because the result would be wrong."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from .expected import installed
from .seams import is_tracing

# Arguments that models pass on to the attention function and that do not change what attention computes.
HARMLESS = frozenset(
    {
        "cache_position",
        "grid",  # ours: patches per column and row
        "is_causal",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",  # checked separately
        "return_dict",
        "use_cache",
    }
)

_PACKED = (
    "Packed sequences (several in one row) are not supported by a linear attention kind: a token would attend to the "
    "other sequences. Give one sequence per row with a 2-D attention_mask, or keep attn_implementation='sdpa'."
)

# Arguments that do change it, with what to do about each.
REFUSED = {
    "output_attentions": (
        "Attention weights do not exist in a linear attention kind, so output_attentions=True has no answer. Call "
        "model.set_attn_implementation('eager') first to get those of softmax attention."
    ),
    "softcap": (
        "A soft cap on attention logits cannot be applied by a linear attention kind. Use attn_implementation='eager'."
    ),
    "sliding_window": (
        "A linear attention kind attends to the whole sequence. Load the model with sliding_window=None, or use "
        "attn_implementation='sdpa'."
    ),
    "s_aux": "Attention sinks are not supported by a linear attention kind. Use attn_implementation='eager'.",
    "sinks": "Attention sinks are not supported by a linear attention kind. Use attn_implementation='eager'.",
    "position_bias": (
        "A bias on attention logits (relative positions, ALiBi) cannot be applied by a linear attention kind. Use "
        "attn_implementation='eager' for this model."
    ),
    "head_mask": "A mask over heads is not supported by a linear attention kind. Use attn_implementation='eager'.",
    "cache": "A paged cache (continuous batching) is not supported. Use model.generate() with its default cache.",
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"), _PACKED),
}


def check_kwargs(kind: str, kwargs: Mapping[str, Any]) -> None:
    """Raise `InputError` or `UnsupportedError` for an argument that changes the result in a way no kind can follow."""
    for name, value in kwargs.items():
        if value is None or value is False or name in HARMLESS:
            continue
        if name == "encoder_hidden_states":
            continue  # cross-attention, decided elsewhere
        if name in REFUSED:
            error = InputError if REFUSED[name] is _PACKED or name == "output_attentions" else UnsupportedError
            raise error(f"{REFUSED[name]} Got {name}={_short(value)} under {kind!r}.")
        raise UnsupportedError(
            f"The attention function of {kind!r} was given {name}={_short(value)}, which it does not know: ignoring "
            "it could give a wrong result. If it comes from your call, drop it; if the model passes it, or "
            f"{installed()}, use attn_implementation='sdpa' for this model."
        )


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


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


def check_positions(position_ids: Any, key_mask: Tensor | None, query_tokens: int) -> None:
    """Raise `InputError` if the positions of a row's real tokens do not increase, as in packed sequences.

    Reads tensor values, so it does nothing while tracing (`torch.compile`, export).
    """
    global _last_checked
    if position_ids is None or query_tokens == 1 or not isinstance(position_ids, Tensor):
        return
    if is_tracing(position_ids) or position_ids.is_meta:
        return
    if position_ids.ndim != 2 or position_ids.shape[1] != query_tokens:
        raise InputError(
            f"position_ids must be [batch, tokens] with {query_tokens} tokens; got {tuple(position_ids.shape)}."
        )
    last = _last_checked
    versioned = not any(tensor.is_inference() for tensor in (position_ids, key_mask) if tensor is not None)
    if versioned and last is not None and _is_seen(position_ids, last[0]) and _is_seen(key_mask, last[1]):
        return
    positions = position_ids
    if key_mask is None:
        wrong = positions[:, 1:] <= positions[:, :-1]
    else:
        real = key_mask[:, -query_tokens:].to(positions.device)
        positions = positions.expand(real.shape[0], -1)
        # For each token, the highest position among the real tokens before it.
        lowest = torch.iinfo(torch.long).min
        highest = positions.long().masked_fill(~real, lowest).cummax(-1).values
        wrong = real[:, 1:] & (positions[:, 1:] <= highest[:, :-1])
    if bool(wrong.any()):
        row = int(wrong.any(-1).nonzero()[0])
        raise InputError(
            f"position_ids must increase along the real tokens of a row; row {row} has "
            f"{positions[row].tolist()[:16]}. {_PACKED}"
        )
    if versioned:
        seen_mask = None if key_mask is None else (weakref.ref(key_mask), key_mask._version)
        _last_checked = ((weakref.ref(position_ids), position_ids._version), seen_mask)


def is_cross_attention(
    module: nn.Module, config: Any, kwargs: Mapping[str, Any], *, is_causal: bool, same_length: bool
) -> bool:
    """Whether queries and keys come from different sequences.

    Raises `UnsupportedError` where a module of an encoder-decoder model does not let one tell.
    """
    declared = getattr(module, "is_cross_attention", None)
    if declared is not None:
        return bool(declared)
    if is_causal:
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
