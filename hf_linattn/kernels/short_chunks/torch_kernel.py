"""The kernels of `operator.py` in plain torch, for CPUs: rows that are cut alike are read together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention_state import AttentionState
from .cutting import Sizes
from .pooled import Pooled
from .reading import Reading
from .sorts import Summarise
from .summaries import ControlVariates

_HALVES = (torch.float16, torch.bfloat16)
# Rounding of a log-sum-exp of float32 is that of all weights in the backward pass. Of larger ones it is computed in
# float64.
_LARGEST = 32.0


class VariateInputs(NamedTuple):
    """Tensors of `short_variates`."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_adapter: Tensor | None
    key_adapter: Tensor | None


class PooledInputs(NamedTuple):
    """Tensors of `short_pooled`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_pooling: Tensor
    value_pooling: Tensor
    key_adapter: Tensor
    query_adapter: Tensor
    far_offset: Tensor
    far_slope: Tensor
    key_slope: Tensor


def short_variates_forward(inputs: VariateInputs, proposals: str, *sizes: Any) -> tuple[Tensor, ...]:
    """Output and log-sum-exp, as `short_variates` describes them, and what is kept of the chunks."""
    return _forward(inputs, Sizes.of(sizes), _variates(proposals, sizes))


def short_variates_backward(
    grads: AttentionState,
    inputs: VariateInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    proposals: str,
    *sizes: Any,
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    return _backward(grads, inputs, results, needs, Sizes.of(sizes), _variates(proposals, sizes))


def short_pooled_forward(inputs: PooledInputs, *sizes: Any) -> tuple[Tensor, ...]:
    """Output and log-sum-exp, as `short_pooled` describes them, and what is kept of the chunks."""
    return _forward(inputs, Sizes.of(sizes), partial(Pooled, scaling=sizes[3]))


def short_pooled_backward(
    grads: AttentionState, inputs: PooledInputs, results: Sequence[Tensor], needs: Sequence[bool], *sizes: Any
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    return _backward(grads, inputs, results, needs, Sizes.of(sizes), partial(Pooled, scaling=sizes[3]))


def _variates(proposals: str, sizes: Sequence[Any]) -> Callable[..., ControlVariates]:
    return partial(ControlVariates, proposals=proposals, scaling=sizes[3])


class _Part(NamedTuple):
    """Rows that are cut alike: `rows` says which, an index or a slice. Parameters are `parameters[models]`."""

    rows: Any
    models: slice
    tokens: Sequence[Tensor]
    parameters: Sequence[Tensor | None]
    sizes: Sizes


def _parts(inputs: Sequence[Any], sizes: Sizes) -> Iterator[_Part]:
    """All rows, in float32 or wider, or those of each length of chunks. Under `vmap` there are parameters for parts of
    the batch, one after the other."""
    if inputs[0].dtype in _HALVES:
        inputs = [None if z is None else z.float() for z in inputs]
    tokens, parameters = inputs[:3], inputs[3:]
    batch, heads = tokens[0].shape[0], tokens[0].shape[2]
    given = next((len(z) for z in parameters if z is not None), heads)
    if given == heads and not sizes.lengths:
        yield _Part(slice(None), slice(None), tokens, parameters, sizes)
    elif given == heads:
        for chunk in sorted(set(sizes.chunks)):
            some = [row for row, own in enumerate(sizes.chunks) if own == chunk]
            lengths = tuple(sizes.lengths[row] for row in some)
            own = sizes._replace(chunk=chunk, lengths=lengths, chunks=())
            if len(some) == batch:
                yield _Part(slice(None), slice(None), tokens, parameters, own)
                return
            index = torch.tensor(some, device="cpu")
            yield _Part(index, slice(None), [z[index] for z in tokens], parameters, own)
    else:
        number = given // heads
        for i in range(number):
            rows, models = (slice(i * n, (i + 1) * n) for n in (batch // number, heads))
            own_parameters = [None if z is None else z[models] for z in parameters]
            yield _Part(rows, models, [z[rows] for z in tokens], own_parameters, sizes)


def _forward(inputs: Sequence[Any], sizes: Sizes, summarise: Summarise) -> tuple[Tensor, ...]:
    found = []
    for part in _parts(inputs, sizes):
        read = Reading(part.tokens, part.parameters, part.sizes, summarise)
        kept: Sequence[Tensor] = read.summaries.kept if not sizes.lengths else ()
        found.append((part.rows, (*read.forward(), *kept)))
    results = found[0][1] if len(found) == 1 else _joined(found, len(inputs[0]))
    if sizes.lengths:  # what is kept would have other sizes in every row
        results = (*results, *(results[1].new_empty(0) for _ in range(3)))
    return results[0].to(inputs[0].dtype), *results[1:]


def _joined(parts: Sequence[tuple[Any, Sequence[Tensor]]], batch: int) -> tuple[Tensor, ...]:
    joined = tuple(z.new_empty(batch, *z.shape[1:]) for z in parts[0][1])
    for rows, found in parts:
        for whole, part in zip(joined, found, strict=True):
            whole[rows] = part
    return joined


def _backward(
    grads: AttentionState,
    inputs: Sequence[Any],
    results: Sequence[Tensor],
    needs: Sequence[bool],
    sizes: Sizes,
    summarise: Summarise,
) -> list[Tensor | None]:
    wide = results[1].dtype
    grad, grad_lse, *results = (z.to(wide) for z in (*grads, *results))
    upstream = grad, (grad_lse if bool(grad_lse.any()) else None)
    parts = list(_parts(inputs, sizes))
    found: list[tuple[_Part, Sequence[Tensor | None]]] = []
    if wide == torch.float32 and _is_large(results[1]):
        parts = [row for part in parts for row in _single_rows(part)]
        for part in parts:
            read = Reading(part.tokens, part.parameters, part.sizes, summarise)
            of_part = [None if z is None else z[part.rows].double() for z in upstream]
            found.append((part, read.backward(*of_part, *read.forward())))
    else:
        for part in parts:
            kept = None if sizes.lengths else [z[part.rows] for z in results[2:]]
            read = Reading(part.tokens, part.parameters, part.sizes, summarise, kept)
            of_part = [None if z is None else z[part.rows] for z in (*upstream, *results[:2])]
            found.append((part, read.backward(*of_part)))
    if len(found) == 1:
        totals = list(found[0][1])
    else:
        totals = [None if z is None else z.new_zeros(z.shape, dtype=wide) for z in inputs]
        for part, of_part in found:
            for number, (total, of_it) in enumerate(zip(totals, of_part, strict=True)):
                if total is not None and of_it is not None:
                    total[part.rows if number < 3 else part.models] += of_it.to(wide)
    return [
        total.to(z.dtype) if needed and total is not None else None
        for total, z, needed in zip(totals, inputs, needs, strict=True)
    ]


def _is_large(lse: Tensor) -> bool:
    if not lse.numel():
        return False
    least, most = lse.aminmax()
    return not (-_LARGEST <= float(least) and float(most) <= _LARGEST)


def _single_rows(part: _Part) -> Iterator[_Part]:
    """Row by row, in float64."""
    parameters = [None if z is None else z.double() for z in part.parameters]
    rows = part.rows
    if isinstance(rows, slice):
        rows = range(*rows.indices(rows.stop if rows.stop is not None else len(part.tokens[0])))
    for place, row in enumerate(rows):
        sizes = part.sizes
        if sizes.lengths:
            sizes = sizes._replace(lengths=sizes.lengths[place : place + 1])
        tokens = [z[place : place + 1].double() for z in part.tokens]
        yield _Part(slice(int(row), int(row) + 1), part.models, tokens, parameters, sizes)
