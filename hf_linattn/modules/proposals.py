"""Learned proposals: what LARA and EVA add to the mean query and key of a landmark or chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .base import LayerShape, StateTensor


def adapter_spec(shape: LayerShape) -> StateTensor:
    """A linear map per head, `[num_heads, head_dim, head_dim]`, that starts at 0.

    Added to the identity, so that a freshly converted model computes what the parameter-free method computes.
    """
    size = (shape.num_heads, shape.head_dim, shape.head_dim)
    return StateTensor(size, learned=True, draw=lambda: torch.zeros(size))


def residual_map(state: Mapping[str, Tensor], name: str) -> Callable[[Tensor], Tensor] | None:
    """`z + z W` with `W = state[name]`, or `None` if the layer has no such tensor."""
    weight = state.get(name)
    if weight is None:
        return None
    return lambda mean: mean + mean @ weight.to(mean.dtype)
