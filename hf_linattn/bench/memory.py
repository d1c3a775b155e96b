"""Peak memory of one training step.

On a CPU it is the high-water mark of the process's resident memory over what it held before the step: everything
counts, also what a library takes without telling PyTorch. The steps run in a fresh child process, whose allocator is
told to give large blocks back at once, so that memory that is free does not count. On CUDA it is what PyTorch's
allocator counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from .plan import Plan, Report, new_row
from .results import Row
from .timing import explain
from .workload import Contender, Unavailable, Workload, make_inputs, make_step

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE_BLOCK = 2**17
WARM_UP_TOKENS = 512


def run_memory(plan: Plan, report: Report = lambda _: None) -> Iterator[list[Row]]:
    """Peak memory of a training step. Yields the rows of one contender at a time."""
    works = plan.workloads("forward+backward")
    for _, members in groupby(works, key=lambda work: (work.is_causal, work.dtype)):
        group = list(members)
        for contender in plan.contenders():
            report(f"memory of {contender.name}, {group[0].direction}, {group[0].dtype}")
            yield [
                replace(new_row("memory", contender, work), peak=peak, reason=reason)
                for work, peak, reason in measure_peaks(contender, group, plan.threads)
            ]


# -- this process -----------------------------------------------------------------------------------------------------
def give_back_large_blocks() -> None:
    """Let resident memory be what is held: glibc keeps freed blocks below a threshold that grows unless it is set."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, LARGE_BLOCK)


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
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # resets the mark
        result = step()
        peak = resident_bytes(most=True)
    del result
    return max(0, peak - before)


# -- a child process --------------------------------------------------------------------------------------------------
def measure_peaks(
    contender: Contender, works: Sequence[Workload], threads: int = 1
) -> Iterator[tuple[Workload, int | None, str]]:
    """Peak memory of one contender for several workloads, short ones first, in a child process.

    Yields: (workload, bytes, ""), or (workload, `None`, the reason). A process that died has no more answers.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_start, initargs=(contender, works[0], threads)) as child:
        for work in works:
            try:
                yield work, child.submit(_peak_of_a_step, contender, work).result(), ""
            except BrokenProcessPool:
                yield work, None, "the process ended, probably out of memory"
            except Exception as error:
                yield work, None, explain(error)


def _start(contender: Contender, work: Workload, threads: int) -> None:
    give_back_large_blocks()
    torch.set_num_threads(threads)
    with contextlib.suppress(Exception):  # the reason is found again
        _peak_of_a_step(contender, replace(work, tokens=min(WARM_UP_TOKENS, work.tokens)))


def _peak_of_a_step(contender: Contender, work: Workload) -> int:
    step = make_step(contender.build(work), make_inputs(work), work)
    step()  # what is made once, like tables and weights, is not part of a step
    return peak_bytes(step, work.device)
