"""Memory that calls use again: taken anew every time, its pages cost as much as the arithmetic of a short input."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

# Numbers of tensors that are kept: smaller ones the allocator has at hand, larger ones are too much to keep.
_LEAST, _MOST = 1 << 15, 1 << 21


class _Kept(threading.local):
    """Of each thread, by name: at most a few times `_MOST` numbers."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def scratch(name: str, like: Tensor, *shape: int) -> Tensor:
    """A tensor with any content, in the dtype of `like`. The next call for the same name gets the same memory."""
    count = math.prod(shape)
    if not _LEAST <= count <= _MOST:
        return like.new_empty(shape)
    key = (name, like.dtype)
    flat = _kept.tensors.get(key)
    if flat is None or flat.numel() < count:
        with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside of it
            flat = _kept.tensors[key] = torch.empty(count, dtype=like.dtype)
    return flat[:count].view(shape)
