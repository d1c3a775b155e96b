"""Which implementation of a kernel runs: plain torch, or Triton.

A backend that is asked for by name runs or raises; only "auto" chooses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError

BACKENDS = ("auto", "torch", "triton")

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the process, and of a `with` block in a thread (or task).
_process = "auto"
_chosen: ContextVar[str | None] = ContextVar("hf_linattn_backend", default=None)
# The same for functions that are being compiled, which cannot read context variables.
_traced: str | None = None


def check_backend(name: str) -> str:
    """Raises `InputError` unless `name` is a backend."""
    if name not in BACKENDS:
        raise InputError(f"backend must be one of {list(BACKENDS)}; got {name!r}.")
    return name


def current_backend() -> str:
    """The backend that kernels use where none is named."""
    chosen = _traced if torch.compiler.is_compiling() else _chosen.get()
    return _process if chosen is None else chosen


def set_backend(name: str) -> None:
    """Choose the backend for the whole process, outside of `use_backend`. Raises: InputError for an unknown name."""
    global _process
    _process = check_backend(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend for a `with` block of this thread. The backward pass uses the one of its forward pass.

    Raises: InputError for an unknown name.
    """
    global _traced
    tracing = torch.compiler.is_compiling()
    before = _traced if tracing else _chosen.get()
    _traced = check_backend(name)
    if not tracing:
        _chosen.set(name)
    try:
        yield
    finally:
        _traced = before
        if not tracing:
            _chosen.set(before)


def triton_interpreted() -> bool:
    """Triton's interpreter runs kernels on the CPU, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on_triton(backend: str, tensor: Tensor) -> bool:
    """Whether a kernel on tensors like `tensor` uses Triton.

    Raises: UnsupportedError if Triton was asked for by name and cannot be used.
    """
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return False
    obstacle = None
    if tensor.dtype not in _TRITON_DTYPES:
        obstacle = f"it computes in float32, bfloat16 and float16; got {tensor.dtype}"
    elif importlib.util.find_spec("triton") is None:
        obstacle = "the package triton is not installed (pip install 'hf-linattn[triton]')"
    elif not tensor.is_cuda and not triton_interpreted():
        obstacle = f"it needs tensors on a GPU; got {tensor.device}"
    if backend == "triton" and obstacle:
        raise UnsupportedError(f"backend='triton' cannot be used: {obstacle}. Use backend='auto' or 'torch'.")
    return not obstacle
