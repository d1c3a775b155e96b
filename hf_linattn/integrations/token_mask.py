"""`TokenMask`: what the mask function makes and the attention functions read, and what is done with it on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UnsupportedError
from ..modules.memory import RecurrentMemory
from ..ops.recurrent.pending import fingerprint
from .patterns import Pattern
from .seams import is_tracing


class _NoAttributeError(UnsupportedError, AttributeError):
    """`hasattr` answers False, every other use is told what is wrong."""


def _refuse(what: str) -> UnsupportedError:
    error = _NoAttributeError if what.startswith(".") else UnsupportedError
    return error(
        f"This model works on the attention mask itself ({what}) instead of handing it to Transformers' "
        "AttentionInterface: it computes attention on its own, so no linear attention kind can replace it and nothing "
        "but padding would be left of the mask. Use attn_implementation='eager' or 'sdpa' for this model."
    )


@dataclass(eq=False)
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
        is_causal: Which of the two patterns the model asked for, if that is known.
        in_graph: Whether it was made while tracing, for the graph that is being made.
        pattern: A scalar bool that must be True when that graph runs, unless the call says where sequences start.
        mask_function: What it was made of, which must then show these sequences.
        was_given: Whether there was an attention_mask.
        starts: `[batch, tokens]` bool, where packed sequences start; `None` for one a row, or where not known.
        found: What the layers found about packed sequences, and of which arguments (`packing.find_sequences`).
        padded: The sequences of a padded batch, for layers that take them one by one.
        ordered: Positions that the graph checks already.
    """

    tokens: Tensor | None
    shape: tuple[int, int]
    device: torch.device | str
    past: tuple[int, ...] | None = None
    follows: bool = False
    refusal: str | None = None
    is_causal: bool | None = None
    in_graph: bool = False
    pattern: Tensor | None = None
    ordered: Tensor | None = None
    mask_function: Pattern | None = None
    was_given: bool = False
    starts: Tensor | None = None
    found: tuple[tuple[Any, ...], Any] | None = None
    padded: Any = None

    ndim: ClassVar[int] = 2
    dtype: ClassVar[torch.dtype] = torch.bool

    def to(self, *args: Any, **kwargs: Any) -> TokenMask:
        """The mask on another device; it is bool whatever type is asked for."""
        device = kwargs.get("device", args[0] if args and isinstance(args[0], (str, int, torch.device)) else None)
        if device is None:
            return self
        return replace(self, tokens=None if self.tokens is None else self.tokens.to(device), device=device)

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


def new_tokens(mask: Any, count: int, memory: RecurrentMemory) -> Any:
    """The part of a mask that is about the last `count` tokens; what it says of those before must be what was seen.

    Raises: `InputError` if it is not.
    """
    if not isinstance(mask, TokenMask) or is_tracing(mask.tokens):
        return mask[:, -count:] if isinstance(mask, Tensor) and mask.ndim == 2 else mask
    if mask.shape[1] > count and mask.tokens is not None:  # made for a layer that needs all tokens
        past = fingerprint(mask.tokens[:, :-count])
        mask = TokenMask(mask.tokens[:, -count:], (mask.shape[0], count), mask.device, past, is_causal=mask.is_causal)
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


def causal_key_mask(query_tokens: int, key_tokens: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """`[batch or 1, 1, queries, keys]` bool, the queries being the last tokens; for exact softmax."""
    mask = torch.ones(query_tokens, key_tokens, dtype=torch.bool, device=device).tril(key_tokens - query_tokens)
    return mask[None, None] if key_mask is None else mask & key_mask[:, None, None, :]


def pad_one_key(key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Append one key that is masked out, which changes nothing but the number of keys."""
    if key_mask is None:
        key_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), F.pad(key_mask, (0, 1), value=False)
