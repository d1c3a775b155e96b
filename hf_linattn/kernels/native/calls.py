"""Calls of C functions, on as many threads as torch may use.

A function takes a structure with everything of a call, and which part of its work to do: from the first of so many
things to before the last. It returns 0 if that is done, 1 if float32 has too few digits for the inputs, and 2 if there
was no memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


def in_parts(function: Any, call: bytes, count: int, cost: float, tensors: Any = None) -> bool:
    """Whether `function` could do all its work, of `count` things and `cost` arithmetic operations.

    tensors: Those whose addresses are in `call`. Threads hold them: after a KeyboardInterrupt here they go on.
    Raises: MemoryError.
    """
    threads = min(torch.get_num_threads(), count, int(cost / _LEAST) + 1)
    if threads == 1:
        status = function(call, c_long(0), c_long(count))
    else:
        borders = [c_long(count * i // threads) for i in range(threads + 1)]
        parts = list(zip(borders, borders[1:], strict=False))
        others = _started(threads, parts[1:], function, call, tensors)
        here = [parts[0], *parts[1 + len(others) :]]
        status = max([*[function(call, *part) for part in here], *[other.result() for other in others]])
    if status == 2:
        raise MemoryError("There is no memory for attention in C.")
    return status == 0


def _started(threads: int, parts: Sequence[Any], function: Any, call: bytes, tensors: Any) -> list[Future[int]]:
    """The first parts, as many as there are threads for: none where the interpreter ends or the system has no more."""
    found = []
    try:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads - 1, "hf_linattn")
        for part in parts:
            found.append(_pools[threads].submit(_part, function, call, part, tensors))
    except RuntimeError:
        pass
    return found


def _part(function: Any, call: bytes, part: Any, tensors: Any) -> int:
    return int(function(call, *part))
