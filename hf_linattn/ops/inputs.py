"""What every public attention function starts with: checks of its inputs, the dtype to compute in, the scaling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.operators import use_backend
from .limits import LARGEST_COUNT, LARGEST_SCALING, check_counts

Fn = TypeVar("Fn", bound=Callable[..., Tensor])

# Learned map of the mean query or key of a landmark or chunk: `[..., head_dim]` to the same shape.
ProposalMap = Callable[[Tensor], Tensor]


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


# The least value of the counts that attention functions share.
_LEAST = {"num_landmarks": 1, "samples_per_landmark": 1, "num_chunks": 1, "chunk_size": 1, "max_chunks": 1}
_LEAST |= {"window_size": 0, "num_global_tokens": 0, "num_heavy_keys": 0}
_OR_NONE = ("chunk_size", "max_chunks")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `InputError` for a value that no attention function can use, of the options that they share."""
    for name, value in options.items():
        if name not in _LEAST or (
            isinstance(value, int) and not isinstance(value, bool) and _LEAST[name] <= value <= LARGEST_COUNT
        ):
            continue
        if value is not None or name not in _OR_NONE:
            check_counts({name: value}, minimum=_LEAST[name], or_none=name in _OR_NONE)
    dropout = options.get("slot_dropout", 0.0)
    if not 0 <= dropout < 1:
        raise InputError(f"slot_dropout must be a probability below 1; got {dropout!r}.")


def check_projection(projection: Tensor, query: Tensor) -> None:
    """Raise `InputError` unless `projection` holds directions for the heads of `query`."""
    heads, head_dim = query.shape[1], query.shape[-1]
    is_shared = projection.ndim == 2
    if (
        not (is_shared or (projection.ndim == 3 and projection.shape[0] == heads))
        or not projection.shape[-2]
        or projection.shape[-1] != head_dim
    ):
        raise InputError(
            f"projection must be [heads, features, head_dim] = [{heads}, features, {head_dim}] or [features,"
            f" {head_dim}]; got {tuple(projection.shape)}."
        )


def factor_of(query: Tensor, scaling: float | None) -> float:
    """The factor of dot products, `head_dim ** -0.5` if `None`. Raises InputError unless > 0 and finite."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not 1 / LARGEST_SCALING <= scaling <= LARGEST_SCALING:
        raise InputError(
            f"scaling must be a finite number > 0, from {1 / LARGEST_SCALING:g} to {LARGEST_SCALING:g}; got"
            f" {scaling!r}."
        )
    return scaling


def scale_inputs(query: Tensor, key: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Scaled coordinates, `x = sqrt(s) q` and `y = sqrt(s) k`, in which the weight of a key is `exp(x . y)`."""
    root = factor_of(query, scaling) ** 0.5
    return query * root, key * root
