"""Attention functions on packed sequences: several in one row, with the numbers of the tokens where they begin."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from .noise import RowNoise, SlotDropout
from .row_groups import RowGroup, RowGroups

# Options that mean something for one sequence a row alone -> what to do.
_NOT_PACKED = {
    "key_mask": "Leave padding out of packed rows, or pass padded rows and key_mask without cu_seqlens",
    "grid": "An image is a row by itself: stack images along the batch",
    "is_cross": "The borders are those of queries and keys at once: pass padded rows and key_mask",
    "real_first": "Leave it out",
}


def packed_attention(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    args: tuple[Any, ...],
    options: Mapping[str, Any],
) -> Tensor:
    """An attention function for each sequence of a packed row; similar lengths at once.

    Args:
        attention: Called with padded rows, `key_mask` and `real_first`.
        query, key, value: `[1, heads, tokens, head_dim]`. args, options: What else the function was given.
    Returns: `[1, heads, tokens, head_dim]`.
    Raises: InputError, UnsupportedError for options that have no meaning for packed sequences.
    """
    rows, options = packed_rows(query, key, options)
    parts = zip(rows.groups, rows.split(query), rows.split(key), rows.split(value), strict=True)
    return rows.join([attention(q, k, v, *args, **of_group(options, rows, group)) for group, q, k, v in parts])


Fn = TypeVar("Fn", bound=Callable[..., Any])


def of_sequences(fn: Fn) -> Fn:
    """A function from queries and keys to a named tuple of tensors with an entry a row, also for packed sequences.

    Sequences without tokens get zeros, which nothing reads.
    """

    @functools.wraps(fn)
    def wrapper(query: Tensor, key: Tensor, **options: Any) -> Any:
        if options.get("cu_seqlens") is None and options.get("max_seqlen") is None:
            return fn(query, key, **options)
        rows, options = packed_rows(query, key, options)
        options.pop("key_mask", None)
        parts = zip(rows.groups, rows.split(query), rows.split(key), strict=True)
        found = [fn(q, k, key_mask=group.real, **options) for group, q, k in parts]
        place = torch.cat([group.sequences for group in rows.groups])
        joined = [torch.cat(tensors) for tensors in zip(*found, strict=True)]
        count = rows.num_sequences
        return type(found[0])(*[z.new_zeros(count, *z.shape[1:]).index_copy(0, place, z) for z in joined])

    return cast(Fn, wrapper)


def packed_rows(query: Tensor, key: Tensor, options: Mapping[str, Any]) -> tuple[RowGroups, dict[str, Any]]:
    """The rows that `cu_seqlens` among the options asks for, and the other options."""
    options = dict(options)
    borders, longest = options.pop("cu_seqlens", None), options.pop("max_seqlen", None)
    if borders is None:
        raise InputError(f"max_seqlen goes with cu_seqlens; got max_seqlen={longest!r} alone.")
    if longest is not None and (isinstance(longest, (bool, float, Tensor)) or longest < 1):
        raise InputError(f"max_seqlen must be an integer >= 1, tokens of the longest sequence; got {longest!r}.")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise InputError(
            "Packed sequences are one row, [1, heads, tokens, head_dim], with queries and keys of the same tokens; got"
            f" query {tuple(query.shape)} and key {tuple(key.shape)}."
        )
    for name, advice in _NOT_PACKED.items():
        given = options.get(name)
        if given is not None and given is not False:
            raise UnsupportedError(f"{name} cannot be given with cu_seqlens. {advice}.")
    if isinstance(options.get("noise"), Tensor):
        raise UnsupportedError(
            "noise cannot be a tensor with cu_seqlens, whose sequences have different numbers of proposals. Pass a"
            " RowNoise with a key for every sequence, or True."
        )
    bias = options.get("window_bias")
    if bias is not None and bias.ndim > 3:
        raise UnsupportedError(
            "window_bias must be [heads or 1, window_size, slots] with cu_seqlens, the same for all sequences; got"
            f" {tuple(bias.shape)}."
        )
    shape = (query.shape[0], query.shape[2])
    return RowGroups.from_cu_seqlens(borders, shape, max_length=longest, device=query.device), options


def of_group(options: Mapping[str, Any], rows: RowGroups, group: RowGroup) -> dict[str, Any]:
    """The options for the rows of a group: what belongs to sequences is that of theirs."""
    found = {name: _of_sequences(name, option, rows, group) for name, option in options.items()}
    return {**found, "key_mask": group.real, "real_first": True}


def _of_sequences(name: str, option: Any, rows: RowGroups, group: RowGroup) -> Any:
    """An option that has a row for each sequence of the batch, with those of a group."""
    if isinstance(option, SlotDropout):
        return SlotDropout(option.probability, _of_sequences(name, option.noise, rows, group))
    if isinstance(option, RowNoise):
        _check_count(name, option.keys.shape[0], rows)
        return option.of_rows(group.sequences)
    if name == "statistics" and isinstance(option, tuple):  # of FAVOR#: of every sequence, or the same for all
        tensors = [z for z in option if z.ndim == 4 and z.shape[0] > 1]
        for z in tensors:
            _check_count(name, z.shape[0], rows)
        return type(option)(*[z[group.sequences] if z.ndim == 4 and z.shape[0] > 1 else z for z in option])
    return option


def _check_count(name: str, count: int, rows: RowGroups) -> None:
    if count != rows.num_sequences:
        raise InputError(f"{name} must be that of {rows.num_sequences} packed sequences; got that of {count} rows.")
