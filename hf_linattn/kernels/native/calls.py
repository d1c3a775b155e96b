"""Calls of C functions, on as many threads as torch may use.

A function takes a structure with everything of a call, and which part of its work to do: from the first of so many
things to before the last. It returns 0 if that is done, 1 if float32 has too few digits for the inputs, and 2 if there
was no memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_long
from typing import Any

import torch
from torch import Tensor

_LEAST = 1e7  # Arithmetic operations of a part: fewer are not worth a thread.
_pools: dict[int, ThreadPoolExecutor] = {}  # by their number of threads
if hasattr(os, "register_at_fork"):  # a forked process has the pools, and none of their threads
    os.register_at_fork(after_in_child=_pools.clear)


def addresses(tensors: Sequence[Tensor | None], strides: int) -> list[int]:
    """Of each tensor its address and so many strides (in numbers); zeros for `None`."""
    found: list[int] = []
    none = [0] * (1 + strides)
    for z in tensors:
        if z is None:
            found += none
        else:
            found.append(z.data_ptr())
            found += z.stride()[:strides]
    return found


def in_parts(function: Any, call: bytes, count: int, cost: float) -> bool:
    """Whether `function` could do all its work, of `count` things and `cost` arithmetic operations.

    Raises: MemoryError.
    """
    threads = min(torch.get_num_threads(), count, int(cost / _LEAST) + 1)
    if threads == 1:
        status = function(call, c_long(0), c_long(count))
    else:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads - 1, "hf_linattn")
        borders = [c_long(count * i // threads) for i in range(threads + 1)]
        others = [
            _pools[threads].submit(function, call, *part) for part in zip(borders[1:], borders[2:], strict=False)
        ]
        status = max(function(call, *borders[:2]), *[other.result() for other in others])
    if status == 2:
        raise MemoryError("There is no memory for attention in C.")
    return status == 0
