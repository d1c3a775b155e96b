"""FAVOR#'s fit to the tokens of every row in C (`native.c`); `ops/favor/fitted.py` says what it computes."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from ..backends import current_backend
from ..native.build import library
from ..native.calls import addresses, in_parts
from ..operators import is_plain

_SOURCE = Path(__file__).with_name("native.c")
# `Call` of native.c: sizes, two sides of three tensors with three strides each, and four addresses.
_CALL = struct.Struct("=6q24q4q")


def fits_in_c(query: Tensor, key: Tensor) -> bool:
    """Whether `fit_rows` takes them: ordinary float32 tensors on a CPU, and C for it."""
    if query.device.type != "cpu" or query.dtype != torch.float32 or current_backend() != "auto":
        return False
    if query.shape != key.shape or not query.numel() or not is_plain((query, key)):
        return False
    return library(_SOURCE) is not None


def fit_rows(query: Tensor, key: Tensor, *, balances: bool, centres: bool) -> tuple[Tensor, ...]:
    """Moved queries and keys `[batch, heads, tokens, dim]` and their biases `[batch, heads, tokens, 1]`, `a` `[batch,
    heads, 1]`, and of both sides `s t`, `t^2` and the other side's mean, `[2, batch, heads, 1, dim]`.

    Args:
        balances: Coordinates get factors with which both sides have equal second moments.
        centres: Means are taken off.
    """
    batch, heads, tokens, dim = query.shape
    given = [z if z.stride(-1) == 1 else z.contiguous() for z in (query, key)]
    moved = [query.new_empty(batch, tokens, heads, dim) for _ in given]
    biases = [query.new_empty(batch, tokens, heads) for _ in given]
    shape = query.new_empty(batch, heads, 1)
    factor, square, other = (query.new_empty(2, batch, heads, 1, dim) for _ in range(3))
    sides: list[Tensor | None] = []
    for z, own, bias in zip(given, moved, biases, strict=True):
        sides += z.transpose(1, 2), own, bias
    packed = _CALL.pack(
        *(batch, heads, tokens, dim, balances, centres),
        *addresses(sides, 3),
        *addresses([shape, factor, square, other], 0),
    )
    functions = library(_SOURCE)
    assert functions is not None
    in_parts(functions.fit_rows, packed, batch * heads, 16.0 * query.numel(), (sides, shape, factor, square, other))
    moved, biases = [z.transpose(1, 2) for z in moved], [z.transpose(1, 2).unsqueeze(-1) for z in biases]
    return *moved, *biases, shape, factor, square, other
