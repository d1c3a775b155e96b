"""Checks of tensors' values, now or when a graph runs, and a warning.

While tracing (`torch.compile`, `torch.export`, a captured CUDA graph, `torch.jit.trace`) values are not there: the
graph gets an assertion of torch, which does not wait for the GPU; its message names this library. `torch.jit.trace`
drops operators without a result, so there a tensor passes through one.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, UnsupportedError
from .seams import is_tracing

PACKED = (
    "Packed sequences (several in one row) need what DataCollatorWithFlattening makes, without attention_mask and with"
    " use_cache=False (docs/packing.md); otherwise give one sequence per row with a 2-D attention_mask."
)
MASKED = (
    "Positions that restart say that a row holds several sequences, and attention_mask that it holds one: leave the"
    f" mask out. {PACKED}"
)
# A compiled graph has shapes that follow from those of its inputs, and no values.
TRACED = (
    "Packed sequences in a compiled or exported model need cu_seq_lens_q and max_length_q, an int, which"
    " DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes (docs/packing.md); torch.jit.trace takes none."
)
_UNORDERED = f"hf_linattn: position_ids must increase along the real tokens of a row. {TRACED}"
NO_PATTERN = (
    "hf_linattn: position_ids must go up by one from token to token, or another mask over query-key pairs was asked"
    f" for. {TRACED}"
)

_LIBRARY = torch.library.Library("hf_linattn", "FRAGMENT")
_LIBRARY.define("require(Tensor passed, Tensor condition, str message) -> Tensor")


def require(passed: Tensor, condition: Tensor, message: str) -> Tensor:
    """Let the graph that is being made fail unless a scalar bool `condition` is True.

    Returns: `passed`, to be used instead of it.
    Raises: when the graph runs, `InputError` or a RuntimeError of torch with the message.
    """
    if torch.jit.is_tracing():
        return torch.ops.hf_linattn.require(passed, condition, message)
    if condition.device.type not in ("cpu", "cuda", "meta"):
        condition = condition.cpu()
    torch._assert_async(condition, message)
    return passed


def _require(passed: Tensor, condition: Tensor, message: str) -> Tensor:
    if not bool(condition):
        raise InputError(message)
    return passed.clone()


_LIBRARY.impl("require", _require, "CompositeExplicitAutograd")
_LIBRARY.impl("require", lambda passed, *_: torch.empty_like(passed), "Meta")
torch.library.register_autograd("hf_linattn::require", lambda ctx, grad: (grad, None, None), lib=_LIBRARY)


def require_order(query: Tensor, mask: Any, position_ids: Tensor, key_mask: Tensor | None) -> Tensor:
    """Let the graph fail where positions do not increase along a row's real tokens, as in packed sequences.

    Args:
        query: `[batch, heads, queries, head_dim]`. mask: What the attention function was given, as a rule a
            `TokenMask`.
        position_ids: `[batch or 1, queries]`. key_mask: `[batch, keys]` bool.
    Returns: `query`, to be used instead of it.
    """
    # Once per forward, not in every layer: the mask is made once. Where gradients are recorded a layer may run within
    # a checkpoint, from which torch.compile lets nothing be remembered.
    may_remember = torch.jit.is_tracing() or not torch.is_grad_enabled()
    remembers = may_remember and getattr(mask, "in_graph", False)
    if remembers and mask.ordered is position_ids:
        return query
    query = require(query, ~out_of_order(position_ids, key_mask, query.shape[2]).any(), _UNORDERED)
    if remembers:
        mask.ordered = position_ids
    return query


def require_pattern(query: Tensor, mask: Any) -> Tensor:
    """Let the graph fail where the mask over query-key pairs that a `TokenMask` was made of hides a token of its row.

    Returns: `query`, to be used instead of it.
    """
    query = require(query, mask.pattern, NO_PATTERN)
    if not torch.is_grad_enabled() and not torch.jit.is_tracing():  # once per forward, as in `require_order`
        mask.pattern = None
    return query


def out_of_order(position_ids: Tensor, key_mask: Tensor | None, query_tokens: int) -> Tensor:
    """`[batch, tokens]`, True where a real token's position is not above those of the row's real tokens before.

    Args:
        position_ids: `[batch or 1, tokens]`. key_mask: `[batch, keys]` bool, the last `tokens` of which are meant.
    """
    # Without slices of one token less, whose length a graph with symbols for sizes wants to tell from 1.
    has_earlier = torch.arange(query_tokens, device=position_ids.device) > 0
    if key_mask is None:
        return has_earlier & (position_ids <= position_ids.roll(1, -1))
    real = key_mask[:, -query_tokens:].to(position_ids.device)
    positions = position_ids.expand(real.shape[0], -1)
    # For each token, the highest position among the real tokens before it.
    lowest = torch.iinfo(torch.long).min
    highest = positions.long().masked_fill(~real, lowest).cummax(-1).values
    return has_earlier & real & (positions <= highest.roll(1, -1))


def check_whole_sequences() -> None:
    """Raise `UnsupportedError` within torch's `context_parallel`, which Accelerate opens for `cp_size`.

    It replaces softmax attention alone: any other would see the tokens of its own process, and no more.
    """
    if str(getattr(F.scaled_dot_product_attention, "__module__", None)).startswith("torch.distributed"):
        raise UnsupportedError(
            "torch's context_parallel (and Accelerate's, with cp_size) exchanges the keys of softmax attention only: a"
            " linear attention kind would see the tokens of its own process. Use hf_linattn.training.context_parallel."
        )


# -- values that are there -------------------------------------------------------------------------------------------
# The position_ids found in order last and the mask they were checked with, each with its version: every layer of a
# forward gets the same tensors. Replaced as a whole, so that threads may share it.
_Seen = tuple[weakref.ref[Tensor], int]
_last_checked: tuple[_Seen, _Seen | None] | None = None


def _is_seen(tensor: Tensor | None, seen: _Seen | None) -> bool:
    if tensor is None or seen is None:
        return tensor is None and seen is None
    return seen[0]() is tensor and seen[1] == tensor._version


def is_ordered(position_ids: Any, key_mask: Tensor | None, query_tokens: int) -> bool | None:
    """Whether the positions of a row's real tokens increase; in packed sequences they do not.

    Returns: `None` where that is left to the graph that is being made (`require_order`): while tracing
        (`torch.compile`, export, `torch.jit.trace`) the values are not there.
    Raises: InputError for positions of another shape.
    """
    global _last_checked
    if position_ids is None or query_tokens == 1 or not isinstance(position_ids, Tensor) or position_ids.is_meta:
        return True
    if position_ids.ndim != 2 or position_ids.shape[1] != query_tokens:
        raise InputError(
            f"position_ids must be [batch, tokens] with {query_tokens} tokens; got {tuple(position_ids.shape)}. Pass "
            "them in this shape; a model that hands others to its layers works with attn_implementation='sdpa'."
        )
    if is_tracing(position_ids):
        return None
    last = _last_checked
    versioned = not any(tensor.is_inference() for tensor in (position_ids, key_mask) if tensor is not None)
    if versioned and last is not None and _is_seen(position_ids, last[0]) and _is_seen(key_mask, last[1]):
        return True
    if bool(out_of_order(position_ids, key_mask, query_tokens).any()):
        return False
    if versioned:
        seen_mask = None if key_mask is None else (weakref.ref(key_mask), key_mask._version)
        _last_checked = ((weakref.ref(position_ids), position_ids._version), seen_mask)
    return True


def check_positions(position_ids: Any, key_mask: Tensor | None, query_tokens: int, advice: str = PACKED) -> None:
    """Raise `InputError` if the positions of a row's real tokens are there and do not increase."""
    if is_ordered(position_ids, key_mask, query_tokens) is not False:
        return
    wrong = out_of_order(position_ids, key_mask, query_tokens)
    row = int(wrong.any(-1).nonzero()[0])
    positions = position_ids.expand(wrong.shape[0], -1)
    raise InputError(
        f"position_ids must increase along the real tokens of a row; row {row} has {positions[row].tolist()[:16]}."
        f" {advice}"
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
