"""The kernels of `operator.py` in plain torch, for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..attention_state import AttentionState
from .cutting import Sizes
from .reading import read_backward, read_forward
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


def _variates(inputs: VariateInputs, proposals: str, options: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of `read_forward`, and of `read_backward` but for its gradients."""
    sizes = Sizes(*options)
    maps = [z for z in inputs[3:] if z is not None]

    def summarise(members, places, adapters):  # type: ignore[no-untyped-def]
        return ControlVariates(members, places, *adapters, proposals, sizes.root)

    return inputs, maps[0].shape[0] if maps else 1, sizes, summarise


def short_variates_forward(inputs: VariateInputs, proposals: str, *options: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `short_variates` describes them."""
    return read_forward(*_variates(inputs, proposals, options))


def short_variates_backward(
    grads: AttentionState,
    inputs: VariateInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    proposals: str,
    *options: Any,
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    tensors, parameters, *how = _variates(inputs, proposals, options)
    return read_backward(grads, tensors, parameters, needs, *how)


def _pooled(members, places, maps):  # type: ignore[no-untyped-def]
    return Pooled(members, places, *maps)


def short_pooled_forward(inputs: PooledInputs, *options: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `short_pooled` describes them."""
    return read_forward(inputs, inputs.key_pooling.shape[0], Sizes(*options), _pooled)


def short_pooled_backward(
    grads: AttentionState,
    inputs: PooledInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    *options: Any,
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    return read_backward(grads, inputs, inputs.key_pooling.shape[0], needs, Sizes(*options), _pooled)
