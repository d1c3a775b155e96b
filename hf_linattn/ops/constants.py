"""Tensors that are kept between calls: what is made for them must not belong to the call that happened to be first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made in the `with` block are ordinary ones, by default on the CPU, whatever is active around it.

    That is inference mode, gradients, autocast, a default device, the transforms of `torch.func` and the fake tensors
    with which `torch.export` traces.
    """
    with contextlib.ExitStack() as stack:
        for manager in (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            temporarily_clear_interpreter_stack(),
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
        ):
            stack.enter_context(manager)
        yield
