"""Half of the squared length of tokens, which every log-weight of a Gaussian direction takes off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def half_norm(x: Tensor) -> Tensor:
    """`|x|^2 / 2`, `[..., tokens, dim]` -> `[..., tokens]`; in float32 or wider. Its gradient is one product."""
    return _HalfNorm.apply(x)


class _HalfNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):
            return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square() / 2
        return (x * x).sum(-1) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad.unsqueeze(-1) * x).to(x.dtype)
