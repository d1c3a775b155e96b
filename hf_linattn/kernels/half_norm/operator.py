"""Half of the squared length of tokens, which every log-weight of a Gaussian direction takes off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import current_backend, runs_on_triton
from ..functions import call
from ..operators import dispatch, register
from . import torch_kernel

# Of the Triton kernel, whose tile is a whole row.
_MAX_DIM = 256


def half_norm(x: Tensor) -> Tensor:
    """`|x|^2 / 2`, `[..., tokens, dim]` -> `[..., tokens]`; in float32 or wider. Its gradient is one product.

    On a GPU a kernel of our own: torch's sum over so short a last dimension reaches a sixth of the memory's speed
    (measured on an H100). Compiled code keeps the formula, which the compiler joins with what is around it.
    """
    backend = current_backend()
    if x.requires_grad or x.is_cuda or backend == "triton":
        return call(_HalfNorm, x, 1.0, 0.0, backend)
    return torch_kernel.half_norm_forward(x)[0]


def length_bias(x: Tensor, *, factor: float = 1.0, less: float = 0.0) -> Tensor:
    """`-factor |x|^2 / 2 - less`: the bias of tokens, `[..., tokens, dim]` -> `[..., tokens, 1]`."""
    backend = current_backend()
    if (x.requires_grad and torch.is_grad_enabled()) or x.is_cuda or backend == "triton":
        return call(_HalfNorm, x, -factor, -less, backend).unsqueeze(-1)
    half = torch_kernel.half_norm_forward(x)[0].mul_(-factor)
    return (half.sub_(less) if less else half).unsqueeze(-1)


class _HalfNorm(torch.autograd.Function):
    """`factor |x|^2 / 2 + constant`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float, constant: float, backend: str) -> Tensor:
        has_kernel = x.ndim == 4 and x.shape[-1] <= _MAX_DIM and not torch.compiler.is_compiling()
        on_triton = has_kernel and runs_on_triton(backend, x)
        half = (_half_norm(x, backend) if on_triton else torch_kernel.half_norm_forward(x))[0]
        half = half if factor == 1.0 else half.mul_(factor)
        return half.add_(constant) if constant else half

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float, str], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        grad = grad if ctx.factor == 1.0 else grad * ctx.factor
        return (grad.unsqueeze(-1) * x).to(x.dtype), None, None, None


def _fake(x: Tensor, backend: str) -> list[Tensor]:
    return [x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))]


_half_norm = register(
    "half_norm(Tensor x, str backend) -> Tensor[]", dispatch(torch_kernel, "half_norm_forward"), _fake
)
