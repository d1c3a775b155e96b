"""The kernels of `operator.py` in plain torch, for CPUs: rows that are cut alike are read together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

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
    return forward(inputs, Sizes.of(sizes), _reading(partial(ControlVariates, proposals=proposals, scaling=sizes[3])))


def short_variates_backward(
    grads: AttentionState,
    inputs: VariateInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    proposals: str,
    *sizes: Any,
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    read = _reading(partial(ControlVariates, proposals=proposals, scaling=sizes[3]))
    return backward(grads, inputs, results, needs, Sizes.of(sizes), read)


def short_pooled_forward(inputs: PooledInputs, *sizes: Any) -> tuple[Tensor, ...]:
    """Output and log-sum-exp, as `short_pooled` describes them, and what is kept of the chunks."""
    return forward(inputs, Sizes.of(sizes), _reading(partial(Pooled, scaling=sizes[3])))


def short_pooled_backward(
    grads: AttentionState, inputs: PooledInputs, results: Sequence[Tensor], needs: Sequence[bool], *sizes: Any
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    return backward(grads, inputs, results, needs, Sizes.of(sizes), _reading(partial(Pooled, scaling=sizes[3])))


class Part(NamedTuple):
    """Rows that are cut alike, and whose summaries have the same parameters.

    rows: Their numbers, or a slice; `None` for all. models: Which heads of all parameters `parameters` are, alike.
    tokens: `[batch, tokens, heads, dim]`.
    """

    rows: Any
    models: slice | None
    tokens: Sequence[Tensor]
    parameters: Sequence[Tensor | None]
    sizes: Sizes


class Reader(Protocol):
    """Of a part. kept: Of its summaries, for the backward pass; of it, `forward` may keep nothing."""

    @property
    def kept(self) -> Sequence[Tensor]: ...

    def forward(self) -> tuple[Tensor, Tensor]: ...

    def backward(self, grad: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor) -> list[Tensor | None]: ...


# From a part, and in the backward pass what was kept of it.
Read = Callable[[Part, Sequence[Tensor] | None], Reader]


def _reading(summarise: Summarise) -> Read:
    return lambda part, kept: Reading(part.tokens, part.parameters, part.sizes, summarise, kept)


def _some(x: Any, rows: Any) -> Any:
    return x if x is None or rows is None else x[rows]


def _parts(inputs: Sequence[Any], sizes: Sizes) -> list[Part]:
    """All rows, in float32 or wider, or those of each length of chunks. Under `vmap` there are parameters for parts of
    the batch, one after the other."""
    if inputs[0].dtype in _HALVES:
        inputs = [None if z is None else z.float() for z in inputs]
    tokens = [inputs[0].transpose(1, 2), inputs[1].transpose(1, 2), inputs[2].transpose(1, 2)]
    parameters = inputs[3:]
    batch, _, heads, _ = tokens[0].shape
    given = heads
    for z in parameters:
        if z is not None:
            given = len(z)
            break
    found: list[Part] = []
    if given != heads:
        number = given // heads
        each = batch // number
        for i in range(number):
            rows, models = slice(i * each, (i + 1) * each), slice(i * heads, (i + 1) * heads)
            own = [z[rows] for z in inputs[:3]], [_some(z, models) for z in parameters]
            for part in _parts([*own[0], *own[1]], sizes):
                own_rows = rows if part.rows is None else part.rows + rows.start
                found.append(part._replace(rows=own_rows, models=models))
        return found
    if len(sizes.lengths) not in (0, batch):  # under `vmap`
        repeats = batch // len(sizes.lengths)
        sizes = sizes._replace(lengths=sizes.lengths * repeats, chunks=sizes.chunks * repeats)
    if len(set(sizes.chunks)) > 1:
        for chunk in sorted(set(sizes.chunks)):
            some = [row for row, own_chunk in enumerate(sizes.chunks) if own_chunk == chunk]
            lengths = tuple(sizes.lengths[row] for row in some)
            index = torch.tensor(some, device="cpu")
            own_sizes = sizes._replace(chunk=chunk, lengths=lengths, chunks=())
            found.append(Part(index, None, [z[index] for z in tokens], parameters, own_sizes))
        return found
    if sizes.lengths:
        sizes = sizes._replace(chunk=sizes.chunks[0], chunks=())
    return [Part(None, None, tokens, parameters, sizes)]


def _single_rows(parts: Sequence[Part]) -> Iterator[Part]:
    """Row by row, in float64."""
    for part in parts:
        count = len(part.tokens[0])
        rows = (
            part.rows.tolist()
            if isinstance(part.rows, Tensor)
            else range(part.rows.start, part.rows.stop)
            if part.rows
            else range(count)
        )
        parameters = [None if z is None else z.double() for z in part.parameters]
        for place, row in enumerate(rows):
            some = slice(place, place + 1)
            sizes = part.sizes._replace(lengths=part.sizes.lengths[some])
            tokens = [z[some].double() for z in part.tokens]
            yield Part(slice(row, row + 1), part.models, tokens, parameters, sizes)


def forward(inputs: Sequence[Any], sizes: Sizes, read: Read) -> tuple[Tensor, ...]:
    """Output and log-sum-exp of all rows, and what is kept."""
    parts = _parts(inputs, sizes)
    found: list[Sequence[Tensor]] = []
    for part in parts:
        reader = read(part, None)
        kept: Sequence[Tensor] = reader.kept if not sizes.lengths else ()
        found.append((*reader.forward(), *kept))
    results = found[0]
    if len(parts) > 1:
        results = [z.new_empty(len(inputs[0]), *z.shape[1:]) for z in results]
        for part, of_part in zip(parts, found, strict=True):
            for whole, own in zip(results, of_part, strict=True):
                whole[part.rows] = own
    output, lse, *rest = results
    if not rest:  # with lengths, what is kept would have other sizes in every row
        rest = [lse.new_empty(0) for _ in range(3)]
    if output.dtype != inputs[0].dtype:
        output = output.to(inputs[0].dtype)
    return output.transpose(1, 2), lse.transpose(1, 2), *rest


def backward(
    grads: AttentionState,
    inputs: Sequence[Any],
    results: Sequence[Tensor],
    needs: Sequence[bool],
    sizes: Sizes,
    read: Read,
    *,
    widens: bool = True,
) -> list[Tensor | None]:
    """Gradients of all inputs that need them.

    widens: Rows with a large log-sum-exp are read in float64.
    """
    wide = results[1].dtype
    given = [None if z is None else z.transpose(1, 2) for z in (*grads, *results[:2])]
    if grads.output.dtype != wide:
        given = [None if z is None else z.to(wide) for z in given]
    is_large = widens and wide == torch.float32 and _is_large(results[1])
    parts = _parts(inputs, sizes)
    totals: list[Tensor | None] = []
    for part in _single_rows(parts) if is_large else parts:
        upstream: list[Any] = [_some(z, part.rows) for z in given]
        if is_large:
            reader = read(part, None)
            upstream = [None if z is None else z.double() for z in upstream[:2]]
            output, lse = reader.forward()
            found = reader.backward(upstream[0], upstream[1], output, lse)
        else:
            kept = [_some(z, part.rows) for z in results[2:]] if results[2].numel() else None
            found = read(part, kept).backward(*upstream)
        if part.rows is None:
            totals = found
            break
        if not totals:
            like = [*given[:1] * 3, *inputs[3:]]
            totals = [None if z is None else z.new_zeros(z.shape, dtype=wide) for z in like]
        for number, (total, own) in enumerate(zip(totals, found, strict=True)):
            if total is None or own is None:
                continue
            if number < 3:
                total[part.rows] = own.to(wide)
            else:
                _some(total, part.models).add_(own)
    totals[:3] = [z.transpose(1, 2) for z in totals[:3]]  # type: ignore[union-attr]
    gradients: list[Tensor | None] = []
    for total, z, needed in zip(totals, inputs, needs, strict=True):
        if not needed or z is None:
            gradients.append(None)
        elif total is None:  # of a map that has no effect, where every key is its own chunk
            gradients.append(torch.zeros_like(z))
        else:
            gradients.append(total if total.dtype == z.dtype else total.to(z.dtype))
    return gradients


def _is_large(lse: Tensor) -> bool:
    if not lse.numel():
        return False
    least, most = lse.aminmax()
    return not (-_LARGEST <= float(least) and float(most) <= _LARGEST)
