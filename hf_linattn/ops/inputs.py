"""What every attention function starts with: checks of inputs and options, scaled tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, UnsupportedError
from ..kernels.backends import current_backend, use_backend
from .exact import ONE_WINDOW, exact_softmax
from .noise import SlotDropout
from .packed import packed_attention
from .padding import GlobalTokens, Tokens, real_tokens_first, reorder_tokens
from .precision import compute_dtype

# How large options may be: beyond it nothing is meant, and integers or memory overflow somewhere else.
LARGEST_COUNT = 2**20  # of tokens, features, landmarks, samples and chunks
LARGEST_FACTOR = 1e6  # of factors that float32 multiplies with
LARGEST_SCALING = 1e30  # of the factor of dot products, and of its inverse

Fn = TypeVar("Fn", bound=Callable[..., Tensor])


def checked_attention(fn: Fn | None = None, *, in_half: tuple[str, ...] = ()) -> Any:
    """Check the shapes of (query, key, value, key_mask) and run `fn` in at least float32, autocast off.

    Packed sequences (`cu_seqlens`) are taken apart here: `fn` gets padded rows.

    Log-weights reach into the hundreds; in a half precision their rounding alone would be an error of e^0.5 and more.
    Where `fn` gives `ONE_WINDOW`, the result is exact attention, in the dtype of the arguments.

    Args:
        in_half: Types of devices on which `fn` takes queries, keys and values in half precision (keeping logits and
            masses in float32 itself), if the hardware multiplies halves faster (`stays_half`).
    """
    if fn is None:
        return functools.partial(checked_attention, in_half=in_half)
    function, takes_packed = fn, "cu_seqlens" in inspect.signature(fn).parameters

    @functools.wraps(function)
    def wrapper(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_inputs(query, key, value, kwargs.get("key_mask"))
        check_options(kwargs)
        if takes_packed and (kwargs.get("cu_seqlens") is not None or kwargs.get("max_seqlen") is not None):
            return packed_attention(wrapper, query, key, value, args, kwargs)
        dtype, device_type, backend = query.dtype, query.device.type, kwargs.get("backend")
        computed = query, key, value
        if dtype != torch.float32 or key.dtype != dtype or value.dtype != dtype:
            compute = compute_dtype(query, key, value, in_half)
            computed = query.to(compute), key.to(compute), value.to(compute)
        if backend is None and not torch.is_autocast_enabled(device_type):  # the common case
            output = function(*computed, *args, **kwargs)
        else:
            with torch.autocast(device_type, enabled=False), use_backend(backend or current_backend()):
                output = function(*computed, *args, **kwargs)
        if output is not ONE_WINDOW:
            return output if output.dtype == dtype else output.to(dtype)
        return exact_softmax(
            query,
            key,
            value,
            kwargs.get("key_mask"),
            scaling=factor_of(query, kwargs.get("scaling")),
            is_causal=kwargs.get("is_causal", False),
            real_first=kwargs.get("real_first", False),
        )

    return cast(Fn, wrapper)


def check_inputs(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    """Raise `InputError` unless the shapes fit together."""
    shape = key.shape
    if query.shape == shape == value.shape and len(shape) == 4 and shape[2] and key_mask is None:
        if query.is_floating_point() and key.is_floating_point() and value.is_floating_point():
            return  # the common case

    def shapes() -> str:
        return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"

    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise InputError(f"query, key and value must be [batch, heads, tokens, head_dim]; got {shapes()}.")
    if key.shape != value.shape and key.shape[:3] != value.shape[:3]:
        raise InputError(f"key and value must agree in batch, heads and tokens; got {shapes()}.")
    if query.shape[:2] != key.shape[:2] or query.shape[-1] != key.shape[-1]:
        raise InputError(
            f"query and key must agree in batch, heads and head_dim; got {shapes()}. Repeat grouped heads first."
        )
    if not (query.is_floating_point() and key.is_floating_point() and value.is_floating_point()):
        raise InputError(
            f"query, key and value must be floating point; got {query.dtype}, {key.dtype} and {value.dtype}."
        )
    if not query.shape[2] or not key.shape[2]:
        raise InputError(f"query and key must have at least one token; got {shapes()}.")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (key.shape[0], key.shape[2])):
        raise InputError(
            f"key_mask must be a bool tensor [batch, key tokens] = {(key.shape[0], key.shape[2])}, True where a token"
            f" is real; got {key_mask.dtype} {tuple(key_mask.shape)}."
        )


def check_counts(options: Mapping[str, Any], *, minimum: int = 1, or_none: bool = False) -> None:
    """Raise `InputError` for the first of `options` that is no integer from `minimum` to `LARGEST_COUNT`."""
    note = ", or None" if or_none else ""
    for name, value in options.items():
        if or_none and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise InputError(f"{name} must be an integer >= {minimum}{note}; got {value!r}.")
        if value > LARGEST_COUNT:
            raise InputError(f"{name} must be an integer >= {minimum} and <= {LARGEST_COUNT}{note}; got {value!r}.")


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
    if isinstance(dropout, SlotDropout):
        dropout = dropout.probability
    if not 0 <= dropout < 1:
        raise InputError(f"slot_dropout must be a probability below 1; got {dropout!r}.")


def check_causal(num_global_tokens: int, num_heavy_keys: int) -> None:
    """Raise `UnsupportedError` for what would show a token of a causal layer later ones."""
    if num_heavy_keys:
        raise UnsupportedError(
            "Heavy keys are chosen by all queries of the row, so in a causal layer every query would learn about later"
            f" tokens; got num_heavy_keys={num_heavy_keys}. Set it to 0."
        )
    if num_global_tokens:
        raise UnsupportedError(
            f"Global tokens see every token, which a causal layer forbids; got num_global_tokens={num_global_tokens}."
            " Set it to 0."
        )


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


def prepare_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    is_causal: bool,
    num_global_tokens: int = 0,
    grid: tuple[int, int] | None = None,
    *,
    real_first: bool = False,
    scaled: bool = True,
) -> Tokens:
    """Scale queries and keys (`x = sqrt(s) q`, `y = sqrt(s) k`), move padding to the end, take out global tokens.

    In a causal layer queries may be fewer than keys (decoding with a kv cache); they are then the last ones.

    Args:
        real_first: The rows are as `RowGroups.split` makes them, real tokens first and zeros behind: nothing has to be
            moved, and what queries of the padding read is left to who made the rows.
        scaled: False leaves the scaling to the functions that are given the tokens (`Tokens.root`).
    Raises: InputError for queries and keys of different sequences, UnsupportedError for global tokens in a
        causal layer.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if is_causal:
        check_causal(num_global_tokens, num_heavy_keys=0)
    if is_causal and grid is not None:
        raise UnsupportedError(f"A causal layer reads a sequence, not an image; got grid={grid!r}. Pass grid=None.")
    root = scaling**0.5
    if scaled:
        query, key, root = query * root, key * root, 1.0
    if num_queries != num_keys:
        if not is_causal or num_queries > num_keys:
            raise InputError(
                f"This form needs queries and keys of the same tokens; got {num_queries} queries and {num_keys} keys."
                " Cross-attention works with FAVOR+ and FAVOR# without window and global tokens, or with softmax."
            )
        query = F.pad(query, (0, 0, num_keys - num_queries, 0))
    count = min(num_global_tokens, num_keys)
    if grid is not None:
        check_grid(num_keys - count, grid, key_mask)
    order = valid = visible = global_tokens = None
    if real_first:
        valid = key_mask
    elif key_mask is not None:
        order, valid = real_tokens_first(key_mask)
        query, key, value = (
            reorder_tokens(query, order, valid),
            reorder_tokens(key, order, valid),
            reorder_tokens(value, order, valid),
        )
    if count:
        global_tokens = GlobalTokens(count, query, key, value, valid, root**2)
        query, key, value = query[:, :, count:], key[:, :, count:], value[:, :, count:]
    if valid is not None:
        valid = valid[:, count:]
        visible = valid[:, None, :, None]
    return Tokens(query, key, value, valid, visible, grid, num_queries, global_tokens, order, key_mask, root)


def check_grid(tokens: int, grid: tuple[int, int], mask: Tensor | None) -> None:
    """A 2-D layout needs exactly `height * width` tokens, all of them real."""
    if grid[0] * grid[1] != tokens:
        raise InputError(
            f"A grid of {grid[0]} x {grid[1]} patches needs {grid[0] * grid[1]} tokens after the global ones; got"
            f" {tokens}. Pass the grid of these images, or grid=None to treat the tokens as a sequence."
        )
    if mask is None:
        return
    must = "A mask over a 2-D grid must be all True (a full rectangle of patches)"
    advice = "Pass grid=None to treat the tokens as a sequence."
    if torch.compiler.is_compiling():  # when the graph runs
        torch._assert_async(mask.all(), f"hf_linattn: {must}. {advice}")
    elif not bool(mask.all()):
        raise InputError(f"{must}; got one with {int((~mask).sum())} masked patches. {advice}")
