"""Parts of a C kernel's work on as many threads as torch may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[int, ThreadPoolExecutor] = {}  # by their number of threads
if hasattr(os, "register_at_fork"):  # a forked process has the pools, and none of their threads
    os.register_at_fork(after_in_child=_pools.clear)


def in_parts(work: Callable[[int, int], int], count: int, cost: float) -> int:
    """The largest of what `work(first, last)` returns for parts of `count` things.

    cost: Of all of it, in arithmetic operations: a part of less than `_LEAST` is not worth a thread.
    """
    threads = min(torch.get_num_threads(), count, int(cost / _LEAST) + 1)
    if threads == 1:
        return work(0, count)
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, "hf_linattn")
    borders = [count * i // threads for i in range(threads + 1)]
    others = [_pools[threads].submit(work, *part) for part in zip(borders[1:], borders[2:], strict=False)]
    found = work(*borders[:2])
    return max(found, *(other.result() for other in others))


_LEAST = 1e7
