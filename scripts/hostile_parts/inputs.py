"""Queries, keys and values that make logits, or differences of logits, large, vanish or coincide."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOKEN = 5  # the one that is huge
Inputs = tuple[Tensor, Tensor, Tensor]


def ordinary(shape: tuple[int, int, int, int], seed: int = 0) -> Inputs:
    """Standard normal queries, keys and values, `[batch, heads, tokens, head_dim]`."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(*shape, generator=generator) for _ in range(3))
    return query, key, value


def _one(index: int) -> Callable[[Inputs, float], Inputs]:
    def change(inputs: Inputs, scale: float) -> Inputs:
        tensors = list(inputs)
        tensors[index] = tensors[index].clone()
        tensors[index][:, :, TOKEN] *= scale
        return tuple(tensors)  # type: ignore[return-value]

    return change


def _all(*which: int, inverse: bool = False) -> Callable[[Inputs, float], Inputs]:
    def change(inputs: Inputs, scale: float) -> Inputs:
        factor = 1 / scale if inverse else scale
        return tuple(z * factor if i in which else z for i, z in enumerate(inputs))  # type: ignore[return-value]

    return change


def _equal(which: tuple[int, ...]) -> Callable[[Inputs, float], Inputs]:
    def change(inputs: Inputs, scale: float) -> Inputs:
        return tuple(  # type: ignore[return-value]
            (z[:, :, :1] * scale).expand_as(z).contiguous() if i in which else z for i, z in enumerate(inputs)
        )

    return change


def _aligned(inputs: Inputs, scale: float) -> Inputs:
    query, _, value = inputs
    return query, query * scale, value


def _shifted(*which: int) -> Callable[[Inputs, float], Inputs]:
    def change(inputs: Inputs, scale: float) -> Inputs:
        shift = torch.randn(*inputs[0].shape[:2], 1, inputs[0].shape[-1], generator=torch.Generator().manual_seed(99))
        return tuple(z + scale * shift if i in which else z for i, z in enumerate(inputs))  # type: ignore[return-value]

    return change


# Name, what is done with ordinary inputs and a scale.
INPUTS: dict[str, Callable[[Inputs, float], Inputs]] = {
    "one query": _one(0),
    "one key": _one(1),
    "one value": _one(2),
    "all queries": _all(0),
    "all keys": _all(1),
    "all values": _all(2),
    "queries and keys": _all(0, 1),
    "tiny": _all(0, 1, 2, inverse=True),
    "equal keys": _equal((1,)),
    "equal tokens": _equal((0, 1)),
    "keys along queries": _aligned,
    "shifted keys": _shifted(1),
    "shifted queries and keys": _shifted(0, 1),
}
