"""Kernels as operators of torch: opaque to `torch.compile` and `torch.export`, usable under `torch.func`.

The library calls a `torch.autograd.Function` around a forward and a backward operator: in that order
`torch.func.grad` and `vmap` work. The forward operator has the same derivative when it is called by itself, as an
exported program does. Derivatives in forward mode and second derivatives raise: torch takes whatever has none for a
constant, and would answer 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError

_LIBRARY = torch.library.Library("hf_linattn", "DEF")


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
) -> Any:
    """Define the operator `hf_linattn::<schema>`.

    Args:
        schema: Every tensor argument and result has a leading batch dimension, so that `vmap` is a longer batch.
        kernel: Computes it on real tensors. fake: Returns empty tensors of the right shape, dtype and (contiguous)
            layout.
        function: What has its derivative, a function of the same arguments. Without one a derivative raises
            UnsupportedError.
    Returns: the operator.
    """
    name = schema.split("(")[0]
    qualified = f"hf_linattn::{name}"
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _in_full_precision(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    operator = getattr(torch.ops.hf_linattn, name).default

    def batched(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def fold(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        results = operator(*[fold(x, dim) for x, dim in zip(args, in_dims, strict=True)])
        found = [x.unflatten(0, (size, -1)) for x in results]
        zeros = [0] * len(found)
        return (found, zeros) if isinstance(results, list) else (tuple(found), tuple(zeros))

    torch.library.register_vmap(qualified, batched, lib=_LIBRARY)
    derivative = _Once if function is None else function
    torch.library.register_autograd(
        qualified, derivative.backward, setup_context=derivative.setup_context, lib=_LIBRARY
    )
    return operator


def _in_full_precision(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast off also where a backward pass runs under it."""

    def run(first: Tensor, *rest: Any) -> Any:
        device_type = first.device.type
        if not torch.is_autocast_enabled(device_type):
            return kernel(first, *rest)
        with torch.autocast(device_type, enabled=False):
            return kernel(first, *rest)

    return run


class _Once(torch.autograd.Function):
    """Runs an operator whose results must not be differentiated, and depends on all that they depend on.

    `once_differentiable` would not do: `torch.func.grad` of a gradient is 0 under it, and `torch.autograd.grad` leaves
    out what comes from the gradients that it marks.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(operator(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(
            "Attention through slots and windows has first derivatives only, and decoding steps have none; a"
            " derivative of one was asked for. Use differences of first derivatives, or attn_implementation='eager'."
        )


def backward_of(operator: Any, *arguments: Any) -> list[Tensor]:
    """What a backward operator returns; differentiating it again raises UnsupportedError."""
    if torch.compiler.is_compiling():  # no functions within functions there, but the operator's own derivative raises
        return list(operator(*arguments))
    return list(_Once.apply(operator, *arguments))


def only(gradients: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The gradients that were asked for: an operator cannot return `None`."""
    return [g for g in gradients if g is not None]


def spread(gradients: list[Tensor], needs: list[bool]) -> tuple[Tensor | None, ...]:
    """Inverse of `only`."""
    left = iter(gradients)
    return tuple(next(left) if needed else None for needed in needs)
