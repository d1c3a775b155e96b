"""The mask function: what Transformers calls once per forward to prepare the attention mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, UnsupportedError
from ..modules.recurrent import RecurrentMemory
from ..ops.recurrent.held import fingerprint
from .canary import check_seams
from .expected import changed
from .patterns import is_unused, refusal
from .seams import MASK_OPTIONS, bidirectional_mask_function, causal_mask_function, is_tracing

_PLAIN = (causal_mask_function, bidirectional_mask_function)


class _NoAttributeError(UnsupportedError, AttributeError):
    """`hasattr` answers False, every other use is told what is wrong."""


def _refuse(what: str) -> UnsupportedError:
    error = _NoAttributeError if what.startswith(".") else UnsupportedError
    return error(
        f"This model works on the attention mask itself ({what}) instead of handing it to Transformers' "
        "AttentionInterface: it computes attention on its own, so no linear attention kind can replace it and nothing "
        "but padding would be left of the mask. Use attn_implementation='eager' or 'sdpa' for this model."
    )


class TokenMask:
    """What `linattn_mask` returns: for the attention function of a kind only.

    A model that computes attention itself would take a bare tensor, or a `None`, for a mask over query-key pairs: a
    decoder would see later tokens. So this is not a tensor, and whatever such a model does with it raises
    `UnsupportedError`. What Transformers does with a 2-D mask before it reaches the mask function works, because
    `generate` with a static cache makes the mask first and passes it to the model as `attention_mask`.

    Args:
        tokens: `[batch, tokens]` bool, True where a token is real; `None` if all are.
        shape: `(batch, tokens)`.
        past: What of the tokens before those of this mask is real, where it covers the new ones alone (`fingerprint`);
            `None`: all of them.
        follows: Whether there are such tokens.
        refusal: Why no layer may use it.
    """

    ndim = 2
    dtype = torch.bool

    def __init__(
        self,
        tokens: Tensor | None,
        shape: tuple[int, int],
        device: torch.device | str,
        past: tuple[int, ...] | None = None,
        follows: bool = False,
        refusal: str | None = None,
    ) -> None:
        self.tokens = tokens
        self.shape = shape
        self.device = device
        self.past = past
        self.follows = follows
        self.refusal = refusal
        self.causal = False  # whether it was asked for as one that hides later tokens

    def to(self, *args: Any, **kwargs: Any) -> TokenMask:
        """The mask on another device; it is bool whatever type is asked for."""
        device = kwargs.get("device", args[0] if args and isinstance(args[0], (str, int, torch.device)) else None)
        if device is None:
            return self
        tokens = None if self.tokens is None else self.tokens.to(device)
        moved = TokenMask(tokens, self.shape, device, self.past, self.follows, self.refusal)
        moved.causal = self.causal
        return moved

    def view(self, *shape: int) -> TokenMask:
        """GPT-2 brings its mask to `[batch, tokens]` this way, which it has already."""
        if len(shape) != 2 or any(size not in (-1, own) for size, own in zip(shape, self.shape, strict=True)):
            raise _refuse(f"view{shape}")
        return self

    def contiguous(self) -> TokenMask:
        """`generate` asks for it when it compiles the model's forward."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _refuse(getattr(function, "__name__", str(function)))

    __hash__ = object.__hash__


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: TokenMask, *args: Any) -> Any:
        raise _refuse(name)

    return method


for _name in (
    "add sub mul truediv floordiv mod pow matmul and or xor radd rsub rmul rtruediv rand ror rxor rmatmul neg invert "
    "abs lt le gt ge eq ne getitem setitem len iter bool float int index array"
).split():
    setattr(TokenMask, f"__{_name}__", _refusing(f"__{_name}__"))


def token_mask(mask: Any, device: torch.device) -> Any:
    """The tensor (or `None`) that a mask given to an attention function stands for, on the queries' device."""
    if not isinstance(mask, TokenMask):
        return mask
    if mask.refusal is not None:
        raise UnsupportedError(mask.refusal)
    return None if mask.tokens is None else mask.tokens.to(device)


def new_tokens(mask: Any, count: int, memory: RecurrentMemory) -> Any:
    """The part of a mask that is about the last `count` tokens; what it says of those before must be what was seen.

    Raises: `InputError` if it is not.
    """
    if not isinstance(mask, TokenMask) or is_tracing(mask.tokens):
        return mask[:, -count:] if isinstance(mask, Tensor) and mask.ndim == 2 else mask
    if mask.shape[1] > count and mask.tokens is not None:  # made for a layer that needs all tokens
        past = fingerprint(mask.tokens[:, :-count])
        mask = TokenMask(mask.tokens[:, -count:], (mask.shape[0], count), mask.device, past)
    memory.check_past(mask.past)
    if mask.tokens is not None and bool(mask.tokens.all()):
        return None
    return mask


def check_past_is_here(mask: Any, keys: int) -> None:
    """Raise `UnsupportedError` if a causal layer without a cache is asked to go on after tokens it cannot see."""
    if isinstance(mask, TokenMask) and (mask.follows or mask.shape[1] > keys):
        raise UnsupportedError(
            f"The model goes on after earlier tokens, but this layer got the {keys} new keys alone and no cache: with"
            " gradient checkpointing in training Transformers drops the cache. Switch it off"
            " (model.gradient_checkpointing_disable()), call model.eval(), or pass the whole sequence."
        )


# In place of an argument that Transformers has to give: a default could be another mask than the one meant.
_NOT_GIVEN: Any = object()


def _remember_causality(make: Callable[..., TokenMask]) -> Callable[..., TokenMask]:
    @functools.wraps(make)
    def mask(*args: Any, **kwargs: Any) -> TokenMask:
        made = make(*args, **kwargs)
        made.causal = kwargs.get("mask_function", args[5] if len(args) > 5 else None) is causal_mask_function
        return made

    return mask


@_remember_causality
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
        mask_function: The pattern the model wants; only the plain causal and bidirectional ones can be honoured.
        attention_mask: `[batch, seen + q_length]`, True where a token is real.
        local_size, use_vmap: Set by Transformers for local windows and for user-defined overlays.
        kwargs: `MASK_OPTIONS`; another one might change the mask.
    Returns: A mask over tokens, for the attention function only (`TokenMask`). Shorter than `kv_length` if the cache
        is longer than what has been seen (static cache): the attention function then drops the unseen keys.
    Raises: `InputError` for a mask that is not 2-D or has the wrong length; `UnsupportedError` for other patterns;
        `UnsupportedTransformersError` for an argument that is not known here, or missing.
        What can only be read from tensors (packed sequences) is not checked while tracing (`torch.compile`, export).
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
    if local_size is not None or use_vmap or (not tracing and mask_function not in _PLAIN):
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
    bidirectional = mask_function is bidirectional_mask_function
    has_state = isinstance(kv_offset, Tensor) or (kv_offset > 0 and kv_offset == q_offset)
    if has_state and kv_length == q_length:  # a cache that returns the new keys alone (`cache.RecurrentLayer`)
        return _mask_of_new(batch_size, q_length, q_offset, attention_mask, device, tracing)
    seen = _seen_tokens(q_length, kv_length, q_offset, attention_mask, bidirectional)
    if seen > kv_length:
        raise UnsupportedError(
            f"The cache returns {kv_length} keys where {seen} tokens have been seen: a cache that forgets tokens is "
            "not supported by a linear attention kind. Use the default (dynamic) cache."
        )
    if attention_mask is None:
        if seen == kv_length:
            return TokenMask(None, (batch_size, seen), device)
        all_seen = torch.ones(batch_size, seen, dtype=torch.bool, device=device)
        return TokenMask(all_seen, (batch_size, seen), device)
    _check_width(attention_mask, batch_size, seen)
    mask = attention_mask.to(torch.bool)
    if mask.shape[0] != batch_size:
        mask = mask.expand(batch_size, -1)
    # Without a cache kv_length is the mask's own width: what differs from the queries is for the attention function to
    # compare with the keys it gets.
    comparable = bidirectional and q_length != kv_length
    if not tracing and not comparable and seen == kv_length and bool(mask.all()):
        return TokenMask(None, (batch_size, seen), device)
    return TokenMask(mask, (batch_size, seen), device)


def _mask_of_new(
    batch_size: int,
    q_length: int,
    q_offset: int | Tensor,
    attention_mask: Tensor | None,
    device: torch.device | str,
    tracing: bool,
) -> TokenMask:
    """The mask of the new tokens, and what it says of those before."""
    shape = (batch_size, q_length)
    follows = True if is_tracing(q_offset) else bool(q_offset)
    if attention_mask is None:
        return TokenMask(None, shape, device, follows=follows)
    if not tracing:
        _check_width(attention_mask, batch_size, int(q_offset) + q_length)
    mask = attention_mask.to(torch.bool).expand(batch_size, -1)
    if not tracing and bool(mask.all()):
        return TokenMask(None, shape, device, follows=follows)
    past = None if tracing else fingerprint(mask[:, :-q_length])
    mask = mask[:, -q_length:]
    if not tracing and bool(mask.all()):
        return TokenMask(None, shape, device, past, follows)
    return TokenMask(mask, shape, device, past, follows)


def _check_width(attention_mask: Tensor, batch_size: int, seen: int) -> None:
    if attention_mask.shape[1] != seen:
        raise InputError(
            f"attention_mask must cover all tokens, past ones included: [batch, {seen}]; got "
            f"{tuple(attention_mask.shape)}."
        )
    if attention_mask.shape[0] not in (1, batch_size):
        raise InputError(
            f"attention_mask must have a row for each of the {batch_size} inputs, [batch, tokens]; got "
            f"{tuple(attention_mask.shape)}."
        )


def _seen_tokens(
    q_length: int, kv_length: int, q_offset: int | Tensor, attention_mask: Tensor | None, bidirectional: bool
) -> int:
    """Tokens that exist once the queries have been added: less than `kv_length` under a static cache."""
    if bidirectional:
        return kv_length  # the keys may be those of another sequence
    if not isinstance(q_offset, Tensor):
        return q_offset + q_length
    if not is_tracing(q_offset):
        return int(q_offset) + q_length
    # The number of seen tokens is a value in a tensor here; the mask's width is the only thing known about it.
    if attention_mask is None:
        raise UnsupportedError(
            "A compiled forward with a static cache needs attention_mask, [batch, seen tokens]; got None. Pass it, or "
            "use the default (dynamic) cache."
        )
    return attention_mask.shape[1]


def causal_key_mask(query_tokens: int, key_tokens: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """`[batch or 1, 1, queries, keys]` bool, the queries being the last tokens; for exact softmax."""
    mask = torch.ones(query_tokens, key_tokens, dtype=torch.bool, device=device).tril(key_tokens - query_tokens)
    return mask[None, None] if key_mask is None else mask & key_mask[:, None, None, :]


def pad_one_key(key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Append one key that is masked out, which changes nothing but the number of keys."""
    if key_mask is None:
        key_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), F.pad(key_mask, (0, 1), value=False)
