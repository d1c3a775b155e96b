"""The kernels of `operator.py` in C (`native.c`). Float64 and tiny windows go to `torch_kernel.py`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..native.build import library
from ..native.calls import addresses, in_parts
from . import torch_kernel
from .cutting import Sizes, tables
from .torch_kernel import Part, PooledInputs, Read, VariateInputs

_SOURCE = Path(__file__).with_name("native.c")
# `Call` of native.c: sizes, a factor, indices, tensors of tokens with three strides each, maps and their gradients.
_CALL = struct.Struct("=11qd2q40q14q")
_STRIDES = 3
_LEARNED = 4
# Tokens of a window, which are the lanes of vectors: with fewer, most lanes are idle.
_FEWEST = 4
_KINDS = {"sum": 0, "mean": 1, "key": 2, "none": 3}


def computes(dtype: torch.dtype, sizes: Sizes) -> bool:
    """Whether tokens like these are computed in C, and nothing is kept for the backward pass."""
    is_fast = sizes.places_of_window >= _FEWEST
    return is_fast and dtype != torch.float64 and sizes.scaling > 0 and library(_SOURCE) is not None


def short_variates_forward(inputs: VariateInputs, proposals: str, *sizes: Any) -> tuple[Tensor, ...]:
    """Output and log-sum-exp, as `short_variates` describes them."""
    cut = Sizes.of(sizes)
    if computes(inputs.key.dtype, cut) and _fits(inputs):
        return torch_kernel.forward(inputs, cut, _reading(_KINDS[proposals]))
    return torch_kernel.short_variates_forward(inputs, proposals, *sizes)


def short_variates_backward(
    grads: AttentionState,
    inputs: VariateInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    proposals: str,
    *sizes: Any,
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    cut = Sizes.of(sizes)
    if computes(inputs.key.dtype, cut) and _fits(inputs):
        return torch_kernel.backward(grads, inputs, results, needs, cut, _reading(_KINDS[proposals]), widens=False)
    return torch_kernel.short_variates_backward(grads, inputs, results, needs, proposals, *sizes)


def short_pooled_forward(inputs: PooledInputs, *sizes: Any) -> tuple[Tensor, ...]:
    """Output and log-sum-exp, as `short_pooled` describes them."""
    cut = Sizes.of(sizes)
    if computes(inputs.key.dtype, cut) and _fits(inputs):
        return torch_kernel.forward(inputs, cut, _reading(_LEARNED))
    return torch_kernel.short_pooled_forward(inputs, *sizes)


def short_pooled_backward(
    grads: AttentionState, inputs: PooledInputs, results: Sequence[Tensor], needs: Sequence[bool], *sizes: Any
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    cut = Sizes.of(sizes)
    if computes(inputs.key.dtype, cut) and _fits(inputs):
        return torch_kernel.backward(grads, inputs, results, needs, cut, _reading(_LEARNED), widens=False)
    return torch_kernel.short_pooled_backward(grads, inputs, results, needs, *sizes)


def _fits(inputs: VariateInputs | PooledInputs) -> bool:
    """Whether the tensors have the shapes that C takes for granted; torch says what is wrong with others."""
    query, key, value, *maps = inputs
    batch, heads, _, dim = query.shape
    if not query.numel() or not query.shape == key.shape == value.shape:
        return False
    square, row = (dim, dim), (dim,)
    shapes = (square, square) if len(maps) == 2 else (row, row, square, square, (), row, row)
    groups = {len(z) for z in maps if z is not None}  # more than heads under `vmap`
    fit = all([z is None or z.shape[1:] == shape for z, shape in zip(maps, shapes, strict=True)])
    return fit and len(groups) < 2 and not any([n == 0 or n % heads or batch % (n // heads) for n in groups])


def _reading(kind: int) -> Read:
    return lambda part, kept: NativeReading(part, kind)


class NativeReading:
    """Some rows that are cut alike; as `Reading`. kind: As in work.h."""

    kept: Sequence[Tensor] = ()

    def __init__(self, part: Part, kind: int) -> None:
        self.tokens, self.parameters = _plain(part.tokens), _plain(part.parameters)
        self.sizes, self.kind = part.sizes, kind

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output `[batch, tokens, heads, dim]` and log-sum-exp; zeros for tokens that are not real."""
        query = self.tokens[0]
        new = query.new_zeros if self.sizes.lengths else query.new_empty
        output, lse = new(query.shape), new(query.shape[:-1])
        self._run("short_forward", [output, lse, None, None, None, None, None])
        return output, lse

    def backward(self, grad: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor) -> list[Tensor | None]:
        """Gradients of the tokens and the parameters, from those of the results (`None` for none)."""
        (grad,) = _plain([grad])
        new = torch.zeros_like if self.sizes.lengths else torch.empty_like
        found = [new(z, memory_format=torch.contiguous_format) for z in self.tokens]
        of_parameters = [None if z is None else torch.empty_like(z) for z in self.parameters]
        self._run("short_backward", [None, None, grad, grad_lse, *found], of_parameters)
        return [*found, *of_parameters]

    def _run(self, name: str, others: Sequence[Tensor | None], grads: Sequence[Tensor | None] = ()) -> None:
        sizes, tokens = self.sizes, self.tokens
        batch, length, heads, dim = tokens[0].shape
        own = length - sizes.num_global
        fixed, members, places = tables(sizes, own), sizes.members, sizes.count(own)
        window = sizes.places_of_window
        is_together = list(grads).count(None) < len(grads)
        maps = [*self.parameters, *[None] * (7 - len(self.parameters)), *grads, *[None] * (7 - len(grads))]
        packed = _CALL.pack(
            *(batch, heads, batch if is_together else 1, len(fixed.token_of), dim, places, window),
            *(sizes.num_global, self.kind, members[0], members[1] if len(members) > 1 else 0),
            sizes.scaling**0.5,
            *(fixed.token_of.data_ptr(), fixed.far.data_ptr()),
            *addresses([*tokens, *others], _STRIDES),
            *addresses(maps, 0),
        )
        cost = 8.0 * batch * heads * length * (window + fixed.far.shape[-1]) * dim
        count = heads if is_together else batch * heads
        in_parts(getattr(library(_SOURCE), name), packed, count, cost, (tokens, self.parameters, others, grads, fixed))


def _plain(tensors: Sequence[Tensor | None]) -> list[Any]:
    """In float32; vectors of tokens without gaps, maps without any."""
    found: list[Any] = []
    for z in tensors:
        if z is not None:
            z = z.float()
            if z.ndim < 4 or (z.stride(-1) != 1 and z.shape[-1] != 1):
                z = z.contiguous()
        found.append(z)
    return found
