"""Which implementation of a kernel runs: portable torch, or Triton.

A backend that is asked for by name runs or raises; only "auto" chooses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError

BACKENDS = ("auto", "torch", "triton")

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_current = "auto"


def check_backend(name: str) -> str:
    """Raises `InputError` unless `name` is a backend."""
    if name not in BACKENDS:
        raise InputError(f"backend must be one of {list(BACKENDS)}; got {name!r}.")
    return name


def current_backend() -> str:
    """The backend that kernels use where none is named."""
    return _current


def set_backend(name: str) -> None:
    """Choose the backend for the whole process. Raises: InputError for an unknown name."""
    global _current
    _current = check_backend(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend for a `with` block. The backward pass uses the one of its forward pass.

    Raises: InputError for an unknown name.
    """
    before = current_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def triton_interpreted() -> bool:
    """Triton's interpreter runs kernels on the CPU, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on_triton(backend: str, tensor: Tensor) -> bool:
    """Whether a kernel on tensors like `tensor` uses Triton.

    Raises: UnsupportedError if Triton was asked for by name and cannot be used.
    """
    if backend == "torch":
        return False
    obstacle = _obstacle(tensor)
    if backend == "triton" and obstacle:
        raise UnsupportedError(f"backend='triton' cannot be used: {obstacle}. Use backend='auto' or 'torch'.")
    return not obstacle and (backend == "triton" or tensor.is_cuda)


def _obstacle(tensor: Tensor) -> str | None:
    if tensor.dtype not in _TRITON_DTYPES:
        return f"it computes in float32, bfloat16 and float16; got {tensor.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'hf-linattn[triton]')"
    if not tensor.is_cuda and not triton_interpreted():
        return f"it needs tensors on a GPU; got {tensor.device}"
    return None
