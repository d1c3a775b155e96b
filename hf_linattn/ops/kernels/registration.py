"""Kernels as operators of torch: opaque to `torch.compile` and `torch.export`, usable under `torch.func`.

An operator here has no derivative of its own; a `torch.autograd.Function` around a forward and a backward operator
has. In that order `torch.func.grad` and `vmap` work, and forward-mode or second derivatives raise instead of being 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("hf_linattn", "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the operator `hf_linattn::<schema>`.

    Args:
        schema: Every tensor argument and result has a leading batch dimension, so that `vmap` is a longer batch.
        kernel: Computes it on real tensors. fake: Returns empty tensors of the right shape, dtype and (contiguous)
            layout.
    Returns: the operator.
    """
    name = schema.split("(")[0]
    qualified = f"hf_linattn::{name}"
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
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
    return operator


def only(gradients: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The gradients that were asked for: an operator cannot return `None`."""
    return [g for g in gradients if g is not None]


def spread(gradients: list[Tensor], needs: list[bool]) -> tuple[Tensor | None, ...]:
    """Inverse of `only`."""
    left = iter(gradients)
    return tuple(next(left) if needed else None for needed in needs)
