"""Memory that calls use again: taken anew every time, its pages cost as much as the arithmetic of a short input."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers of tensors that are kept: smaller ones the allocator has at hand, larger ones are too much to keep.
SMALL, _MOST = 1 << 15, 1 << 20


class Workspace(NamedTuple):
    """Where results of a tile go; `None` for tensors of their own. See `reading.Read` for what they are."""

    features: Tensor | None = None
    sums: Tensor | None = None
    others: Tensor | None = None
    of_slots: Tensor | None = None
    in_window: Tensor | None = None
    logits: Tensor | None = None
    weights: Tensor | None = None
    output: Tensor | None = None


OWN = Workspace()


class _Kept(threading.local):
    """Of each thread, by name and dtype: at most 15 times `_MOST` numbers."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def workspace(groups: int, count: int, windows: int, slots: int, dim: int, dtype: torch.dtype) -> Workspace:
    """For `groups` of `count` tokens each, in so many windows in all, with values of `dim`."""
    places = groups * count // windows
    return Workspace(
        features=scratch("features", dtype, groups, count, slots),
        sums=scratch("sums", dtype, windows, slots, dim),
        others=scratch("others", dtype, windows, slots, dim),
        of_slots=scratch("of slots", dtype, groups, count, slots),
        in_window=scratch("in window", dtype, windows, places, places),
        logits=scratch("logits", dtype, windows, places, places + slots),
        weights=scratch("weights", dtype, windows, places, places + slots),
        output=scratch("output", dtype, windows, places, dim),
    )


def scratch(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor with any content. The next call for the same name gets the same memory."""
    count = math.prod(shape)
    if not SMALL <= count <= _MOST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    key = (name, dtype)
    flat = _kept.tensors.get(key)
    if flat is None or flat.numel() < count:
        with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside of it
            flat = _kept.tensors[key] = torch.empty(count, dtype=dtype, device="cpu")
    return flat[:count].view(shape)
