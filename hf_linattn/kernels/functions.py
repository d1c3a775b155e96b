"""Calling a `torch.autograd.Function` without what costs more than a small product."""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)` of positional arguments, all given.

    `apply` binds the arguments of a function with a `setup_context` to the signature of its `forward`, to fill in
    defaults: 13 of the 17 microseconds that a call took.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(arguments))  # type: ignore[misc]
