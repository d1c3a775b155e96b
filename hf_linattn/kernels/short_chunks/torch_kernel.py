"""The kernels of `operator.py` in plain torch, for CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention_state import AttentionState
from .cutting import Sizes
from .reading import Summarise, read_backward, read_forward
from .summaries import ControlVariates, Pooled


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
    return _forward(inputs, Sizes(*sizes), _variates(proposals, sizes))


def short_variates_backward(
    grads: AttentionState,
    inputs: VariateInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    proposals: str,
    *sizes: Any,
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    return _backward(grads, inputs, results, needs, Sizes(*sizes), _variates(proposals, sizes))


def short_pooled_forward(inputs: PooledInputs, *sizes: Any) -> tuple[Tensor, ...]:
    """Output and log-sum-exp, as `short_pooled` describes them, and what is kept of the chunks."""
    return _forward(inputs, Sizes(*sizes), partial(Pooled, scaling=sizes[-1]))


def short_pooled_backward(
    grads: AttentionState, inputs: PooledInputs, results: Sequence[Tensor], needs: Sequence[bool], *sizes: Any
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    return _backward(grads, inputs, results, needs, Sizes(*sizes), partial(Pooled, scaling=sizes[-1]))


def _variates(proposals: str, sizes: Sequence[Any]) -> Callable[..., ControlVariates]:
    return partial(ControlVariates, proposals=proposals, scaling=sizes[-1])


def _forward(inputs: Sequence[Any], sizes: Sizes, summarise: Summarise) -> tuple[Tensor, ...]:
    parts = [read_forward(*part, sizes, summarise) for part in _parts(inputs)]
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _backward(
    grads: AttentionState,
    inputs: Sequence[Any],
    results: Sequence[Tensor],
    needs: Sequence[bool],
    sizes: Sizes,
    summarise: Summarise,
) -> list[Tensor | None]:
    parts = _parts(inputs)
    some = zip(*(z.chunk(len(parts)) for z in (*grads, *results)), strict=True)
    found = [
        read_backward(AttentionState(*given[:2]), given[2:], *part, sizes, summarise)
        for part, given in zip(parts, some, strict=True)
    ]
    grads_of = list(zip(*found, strict=True))
    return [
        None if not needed else (each[0] if len(each) == 1 else torch.cat(each)) if place < 3 else torch.stack(each)
        for place, (each, needed) in enumerate(zip(grads_of, needs, strict=True))
    ]


def _parts(inputs: Sequence[Any]) -> list[tuple[Sequence[Tensor], list[Any]]]:
    """Queries, keys and values, and their parameters. Under `vmap` parts of the batch may have different ones."""
    number = next((len(z) for z in inputs[3:] if z is not None), 1)
    if number == 1:
        return [(inputs[:3], [None if z is None else z[0] for z in inputs[3:]])]
    tokens = zip(*(z.chunk(number) for z in inputs[:3]), strict=True)
    return [(each, [None if z is None else z[i] for z in inputs[3:]]) for i, each in enumerate(tokens)]
