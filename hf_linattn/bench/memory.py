"""Peak memory of one training step.

On a CPU it is the high-water mark of the process's resident memory over what it held before the step: everything
counts, also what a library takes without telling PyTorch. The C library's allocator is told to give memory back that
is free, so that it does not count. On CUDA it is what PyTorch's allocator counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .plan import Plan, Report, new_row
from .results import Row
from .timing import explain
from .workload import Unavailable, make_inputs, make_step

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE_BLOCK = 2**17


def run_memory(plan: Plan, report: Report = lambda _: None) -> Iterator[list[Row]]:
    """Peak memory of a training step. Yields the rows of one workload at a time."""
    give_back_free_memory()
    for work in plan.workloads("forward+backward"):
        report(f"memory, {work.tokens} tokens, {work.direction}, {work.dtype}")
        rows = []
        for contender in plan.contenders():
            rows.append(row := new_row("memory", contender, work))
            try:
                step = make_step(contender.build(work), make_inputs(work), work)
                step()  # what is made once, like tables and weights, is not part of a step
                row.peak = peak_bytes(step, plan.device)
            except Exception as error:
                row.reason = explain(error)
        yield rows


def give_back_free_memory() -> None:
    """Let resident memory be what is held: all that is free now, and later every large block as soon as it is free.

    Left alone, glibc keeps freed blocks below a threshold that grows with them. To be called before the first large
    block: pieces that were kept earlier are used again, and how they are cut decides how much becomes resident.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, LARGE_BLOCK)
        libc.malloc_trim(0)


def resident_bytes(*, most: bool = False) -> int:
    """Resident memory of this process, now or at most since the mark was reset. Raises `Unavailable` without Linux."""
    if sys.platform != "linux":
        raise Unavailable("only Linux tells the peak memory of a process")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if most else "VmRSS"].split()[0]) * 1024


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes held at once during `step`, beyond those held before it. What `step` returns counts."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        give_back_free_memory()
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark
        result = step()
        peak = resident_bytes(most=True)
    del result
    return max(0, peak - before)
