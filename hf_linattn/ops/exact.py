"""Exact softmax attention with its log-sum-exp, and the checks that every public attention function starts with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.attend import attend
from ..kernels.attention_state import AttentionState
from ..kernels.backend import use_backend
from .limits import LARGEST_SCALING, check_counts

Fn = TypeVar("Fn", bound=Callable[..., Tensor])


def checked_attention(fn: Fn | None = None, *, in_half: tuple[str, ...] = ()) -> Any:
    """Check the shapes of (query, key, value, key_mask) and run `fn` in at least float32, autocast off.

    Log-weights reach into the hundreds; in a half precision their rounding alone would be an error of e^0.5 and more.

    Args:
        in_half: Types of devices on which `fn` takes queries, keys and values in half precision (keeping logits and
            masses in float32 itself), if the hardware multiplies halves faster (`stays_half`).
    """
    if fn is None:
        return functools.partial(checked_attention, in_half=in_half)
    function = fn

    @functools.wraps(function)
    def wrapper(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_inputs(query, key, value, kwargs.get("key_mask"))
        check_options(kwargs)
        dtype, device_type = query.dtype, query.device.type
        compute = compute_dtype(query, key, value, in_half)
        query, key, value = query.to(compute), key.to(compute), value.to(compute)
        backend = kwargs.get("backend")
        with torch.autocast(device_type, enabled=False):
            if backend is None:
                return function(query, key, value, *args, **kwargs).to(dtype)
            with use_backend(backend):
                return function(query, key, value, *args, **kwargs).to(dtype)

    return cast(Fn, wrapper)


def compute_dtype(query: Tensor, key: Tensor, value: Tensor, in_half: tuple[str, ...] = ()) -> torch.dtype:
    """What attention computes in: at least float32, unless halves are multiplied faster (`stays_half`)."""
    # They may differ under autocast, where rotary positions lift queries and keys to float32.
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    return dtype if stays_half(dtype, query.device.type, in_half) else torch.promote_types(dtype, torch.float32)


_MATRIX_UNIT = torch.cpu._is_amx_tile_supported()


def stays_half(dtype: torch.dtype, device_type: str, devices: tuple[str, ...]) -> bool:
    """Whether a function that takes halves on these types of devices gets them.

    On CPUs only with a matrix unit (AMX): with vector instructions alone, float32 was as fast.
    """
    if dtype not in (torch.float16, torch.bfloat16) or device_type not in devices:
        return False
    return device_type == "cuda" or (device_type == "cpu" and dtype == torch.bfloat16 and _MATRIX_UNIT)


def check_inputs(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    """Raise `InputError` unless the shapes fit together."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise InputError(f"query, key and value must be [batch, heads, tokens, head_dim]; got {shapes}.")
    if key.shape != value.shape and key.shape[:3] != value.shape[:3]:
        raise InputError(f"key and value must agree in batch, heads and tokens; got {shapes}.")
    if query.shape[:2] != key.shape[:2] or query.shape[-1] != key.shape[-1]:
        raise InputError(
            f"query and key must agree in batch, heads and head_dim; got {shapes}. Repeat grouped heads first."
        )
    if not (query.is_floating_point() and key.is_floating_point() and value.is_floating_point()):
        raise InputError(
            f"query, key and value must be floating point; got {query.dtype}, {key.dtype} and {value.dtype}."
        )
    if not query.shape[2] or not key.shape[2]:
        raise InputError(f"query and key must have at least one token; got {shapes}.")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (key.shape[0], key.shape[2])):
        raise InputError(
            f"key_mask must be a bool tensor [batch, key tokens] = {(key.shape[0], key.shape[2])}, True where a token"
            f" is real; got {key_mask.dtype} {tuple(key_mask.shape)}."
        )


_COUNTS = ("num_landmarks", "samples_per_landmark", "num_chunks", "chunk_size", "max_chunks")
_SIZES = ("window_size", "num_global_tokens", "num_heavy_keys")  # 0 for none


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `InputError` for a value that no attention function can use, of the options that they share."""
    for name in _COUNTS:
        check_counts({name: options.get(name, 1)}, or_none=name in ("chunk_size", "max_chunks"))
    check_counts({name: options[name] for name in _SIZES if name in options}, minimum=0)
    dropout = options.get("slot_dropout", 0.0)
    if not 0 <= dropout < 1:
        raise InputError(f"slot_dropout must be a probability below 1; got {dropout!r}.")


def root_of(query: Tensor, scaling: float | None) -> float:
    """The square root of the factor of dot products, `head_dim ** -0.5` if `None`. Raises InputError unless > 0."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not 1 / LARGEST_SCALING <= scaling <= LARGEST_SCALING:
        raise InputError(
            f"scaling must be a finite number > 0, from {1 / LARGEST_SCALING:g} to {LARGEST_SCALING:g}; got"
            f" {scaling!r}."
        )
    return scaling**0.5


def scale_inputs(query: Tensor, key: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
    """`x = sqrt(s) q`, `y = sqrt(s) k`: the coordinates in which the weight of a key is `exp(x . y)`."""
    root = root_of(query, scaling)
    return query * root, key * root


def causal_visibility(query_tokens: int, key_tokens: int, device: torch.device) -> Tensor:
    """`[queries, keys]` bool, aligned at the end: the last query sees every key."""
    rows = torch.arange(query_tokens, device=device)[:, None] + (key_tokens - query_tokens)
    return torch.arange(key_tokens, device=device)[None, :] <= rows


def without_padding(key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masked keys and values set to 0, so that inf or NaN in the padding reaches neither values nor gradients."""
    if key_mask is None:
        return key, value
    padding = ~key_mask[:, None, :, None]
    return key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)


def exact_partial(x: Tensor, y: Tensor, value: Tensor, visible: Tensor | None = None) -> AttentionState:
    """Softmax attention on scaled inputs, with its mass. `visible` broadcasts to `[..., queries, keys]`."""
    return attend(x, y, value, visible=visible)


@checked_attention
def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Exact softmax attention: the reference every kind is measured against.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1. Differs from it: a query without any visible key gives
        0.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, heads, keys, head_dim]`.
        key_mask: `[batch, keys]` bool, True where a key is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        is_causal: No query sees a later key; the last query is aligned with the last key.
        backend: As in `favor_attention`.
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`.
    Raises: InputError if the shapes do not fit.
    Cost: O(queries * keys * head_dim) time, O(queries * keys) memory. Random: no.
    """
    key, value = without_padding(key, value, key_mask)
    x, y = scale_inputs(query, key, scaling)
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if is_causal:
        causal = causal_visibility(x.shape[2], y.shape[2], x.device)
        visible = causal if visible is None else causal & visible
    return exact_partial(x, y, value, visible).output
