"""Tensors that are kept between calls: what is made for them must not belong to the call that happened to be first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def outside_tracing() -> Iterator[None]:
    """Tensors made in the `with` block are ordinary ones, by default on the CPU, whatever is active around it.

    That is inference mode, gradients, autocast, a default device, the transforms of `torch.func`, the fake tensors
    with which `torch.export` traces and the recording of `torch.jit.trace`.
    """
    with contextlib.ExitStack() as stack:
        for manager in (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            temporarily_clear_interpreter_stack(),
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
            unrecorded(),
        ):
            stack.enter_context(manager)
        yield


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """The `with` block is not part of what is traced around it, and modes can be used in it."""
    modes = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with unrecorded(), _disable_current_modes():
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """What `torch.jit.trace` does not see: sizes are numbers, and results are constants of the trace."""
    recording = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(recording)  # type: ignore[attr-defined]


def known(size: int | Tensor) -> int:
    """A size as a number: `torch.jit.trace` has tensors for sizes, which cannot be compared without a warning."""
    if not isinstance(size, Tensor):
        return size
    with unrecorded():
        return int(size)
