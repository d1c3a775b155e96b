"""Learned tensors in the graph of a training pass that may have done without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.operators import is_plain


def with_tensors(output: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """`output`, of which `tensors` have a gradient, 0 where nothing else gives them one.

    Distributed training waits for the gradient of every parameter.
    """
    if is_plain((output, *tensors)):
        return _InGraph.apply(output, *tensors)
    # What traces or transforms a call sees ordinary operations.
    return output + sum(0.0 * z.sum().to(output.dtype) for z in tensors)


class _InGraph(torch.autograd.Function):
    """In place of two operations for every tensor and one for the output, forward and backward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *tensors: Tensor) -> Tensor:
        ctx.tensors = tensors  # for their shapes alone
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.tensors, ctx.needs_input_grad[1:], strict=True)
        return grads[0], *(torch.zeros_like(z) if needs else None for z, needs in needed)
