"""The mask function: what Transformers calls once per forward to prepare the attention mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..ops.recurrent.pending import fingerprint
from ..ops.tracing import known
from .canary import check_seams
from .checks import check_whole_sequences, require
from .expected import changed
from .patterns import Pattern, is_packed, is_unused, refusal
from .seams import MASK_OPTIONS, bidirectional_mask_function, causal_mask_function, is_tracing
from .token_mask import TokenMask

_PLAIN = (causal_mask_function, bidirectional_mask_function)

# In place of an argument that Transformers has to give: a default could be another mask than the one meant.
_NOT_GIVEN: Any = object()


def linattn_mask(
    batch_size: int = _NOT_GIVEN,
    q_length: int = _NOT_GIVEN,
    kv_length: int = _NOT_GIVEN,
    q_offset: int | Tensor = _NOT_GIVEN,
    kv_offset: int | Tensor = _NOT_GIVEN,
    mask_function: Callable[..., Any] = _NOT_GIVEN,
    attention_mask: Tensor | TokenMask | None = _NOT_GIVEN,
    *,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> TokenMask:
    """Turn what the user and the model asked for into a mask over tokens. Causality is left to the attention function.

    Args:
        q_length, kv_length: Tokens of the queries and of the keys as the cache will return them.
        q_offset: Tokens already seen (a tensor under a static cache).
        kv_offset: Tokens before those that the cache returns: of a layer with a state all that were seen.
        mask_function: The pattern the model wants; only the plain causal and bidirectional ones can be honoured, and
            that of packed sequences.
        attention_mask: `[batch, seen + q_length]`, True where a token is real.
        local_size, use_vmap: Set by Transformers for local windows and for user-defined overlays.
        kwargs: `MASK_OPTIONS`; another one might change the mask.
    Returns: A mask over tokens, for the attention function only (`TokenMask`). Shorter than `kv_length` if the cache
        is longer than what has been seen (static cache): the attention function then drops the unseen keys.
    Raises: `InputError` for a mask that is not 2-D or has the wrong length; `UnsupportedError` for other patterns;
        `UnsupportedTransformersError` for an argument that is not known here, or missing.
        What can only be read from tensors (positions that restart) raises when the graph runs, while tracing.
    """
    check_seams(getattr(kwargs.get("config"), "model_type", None))
    unknown = [
        name for name, value in kwargs.items() if name not in MASK_OPTIONS and value is not None and value is not False
    ]
    if unknown:
        raise changed("arguments of a mask function", ", ".join(unknown))
    given = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    if any(value is _NOT_GIVEN for value in given):
        raise changed("arguments of a mask function", f"{sum(value is not _NOT_GIVEN for value in given)} of these")
    if isinstance(attention_mask, TokenMask):
        if attention_mask.shape[1] == q_length == kv_length:
            return attention_mask
        attention_mask = attention_mask.tokens
    tracing = is_tracing(attention_mask) if attention_mask is not None else is_tracing()
    if not tracing:
        check_whole_sequences()
    batch_size, q_length, kv_length = known(batch_size), known(q_length), known(kv_length)
    is_plain = mask_function in _PLAIN
    # Transformers adds the pattern of packed sequences to all masks that it makes while tracing and without a cache.
    may_be_plain = is_plain or (tracing and not isinstance(q_offset, Tensor) and q_length == kv_length)
    starts, pattern = None, None
    if not is_plain and local_size is None and not use_vmap and (tracing or is_packed(mask_function)):
        pattern = Pattern(mask_function, batch_size, q_length, device)
        starts = None if tracing else pattern.starts()
    if local_size is not None or use_vmap or not (may_be_plain or starts is not None):
        patterned, config = None if tracing else mask_function, kwargs.get("config")
        reason = refusal(patterned, config, local_size)
        if not is_unused(patterned, config):
            raise UnsupportedError(reason)
        return TokenMask(None, (batch_size, kv_length), device, refusal=reason)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise InputError(
            "attention_mask must be 2-D, [batch, tokens] with 1 where a token is real; got "
            f"{attention_mask.ndim}-D {tuple(attention_mask.shape)}. A linear attention kind cannot hide single "
            "query-key pairs."
        )
    if isinstance(q_offset, Tensor) and (torch.jit.is_tracing() or not is_tracing(q_offset)):
        q_offset = known(q_offset)
    has_state = isinstance(kv_offset, Tensor) or (kv_offset > 0 and kv_offset == q_offset)
    is_new = has_state and kv_length == q_length  # a cache that returns the new keys alone (`cache.RecurrentLayer`)
    bidirectional = mask_function is bidirectional_mask_function
    seen = q_length if is_new else _seen_tokens(q_length, kv_length, q_offset, attention_mask, bidirectional)
    made = TokenMask(None, (batch_size, seen), device, in_graph=tracing, was_given=attention_mask is not None)
    if seen > kv_length:
        raise UnsupportedError(
            f"The cache returns {kv_length} keys where {seen} tokens have been seen: a cache that forgets tokens is "
            "not supported by a linear attention kind. Use the default (dynamic) cache."
        )
    if is_new:
        made.follows = True if is_tracing(q_offset) else bool(q_offset)
    if attention_mask is not None:
        is_past_unknown = isinstance(q_offset, Tensor) and not bidirectional
        width = q_offset + q_length if is_new or is_past_unknown else seen
        tokens = _real_tokens(attention_mask, batch_size, width)
        # Without a cache kv_length is the mask's own width: what differs from the queries is for the attention
        # function to compare with the keys it gets.
        may_drop = not tracing and (is_new or (seen == kv_length and (q_length == kv_length or not bidirectional)))
        if not (may_drop and bool(tokens.all())):
            made.tokens = tokens
            if is_new:
                made.past = None if tracing else fingerprint(tokens[:, :-q_length])
                tokens = tokens[:, -q_length:]
                made.tokens = None if not tracing and bool(tokens.all()) else tokens
    elif seen != kv_length:
        made.tokens = torch.ones(batch_size, seen, dtype=torch.bool, device=device)
    if is_plain:
        made.is_causal = not bidirectional
    elif pattern is not None and starts is not None:
        made.starts, made.is_causal = starts, pattern.is_causal(starts)
    elif pattern is not None:
        made.pattern, made.mask_function = pattern.is_whole(), pattern
    return made


def _real_tokens(attention_mask: Tensor, batch_size: int, width: int | Tensor) -> Tensor:
    """The mask as bool, with a row for each input.

    Raises: `InputError` for another width, when a graph runs if the width is not known before.
    """
    rows, found = known(attention_mask.shape[0]), known(attention_mask.shape[1])
    if isinstance(width, Tensor):
        attention_mask = require(attention_mask, width.reshape(()) == found, f"hf_linattn: {_WIDTH} seen + new].")
    elif found != width:
        raise InputError(f"{_WIDTH} {width}]; got {tuple(attention_mask.shape)}.")
    if rows not in (1, batch_size):
        raise InputError(
            f"attention_mask must have a row for each of the {batch_size} inputs, [batch, tokens]; got "
            f"{tuple(attention_mask.shape)}."
        )
    mask = attention_mask.to(torch.bool)
    return mask if rows == batch_size else mask.expand(batch_size, -1)


_WIDTH = "attention_mask must cover all tokens, past ones included: [batch,"


def _seen_tokens(
    q_length: int, kv_length: int, q_offset: int | Tensor, attention_mask: Tensor | None, bidirectional: bool
) -> int:
    """Tokens that exist once the queries have been added: less than `kv_length` under a static cache."""
    if bidirectional:
        return kv_length  # the keys may be those of another sequence
    if not isinstance(q_offset, Tensor):
        return q_offset + q_length
    # The number of seen tokens is a value in a tensor here; the mask's width is the only thing known about it.
    if attention_mask is None:
        raise UnsupportedError(
            "A compiled forward with a static cache needs attention_mask, [batch, seen tokens]; got None. Pass it, or "
            "use the default (dynamic) cache."
        )
    return attention_mask.shape[1]
