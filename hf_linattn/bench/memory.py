"""Peak memory of one step.

On a CPU it is the high-water mark of the process's resident memory over what it held before the step: everything
counts, also what a library takes without telling PyTorch. The steps run in a fresh child process, whose allocator is
told to give large blocks back at once, so that memory that is free does not count. On CUDA it is what PyTorch's
allocator counts.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from .timing import explain
from .workload import Contender, Unavailable, Workload, make_inputs, make_step

# glibc keeps freed blocks below a threshold that grows by itself; fixed, large tensors go back at once.
CHILD_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
WARM_UP_TOKENS = 512


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def reset_high_water() -> None:
    """Let `high_water_bytes` start anew. Only Linux can; elsewhere longer steps have to come after shorter ones."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def high_water_bytes() -> int:
    """The most resident memory since the last reset. Raises `Unavailable` where the system does not tell."""
    if sys.platform == "linux":  # `getrusage` would count what the parent held
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError as error:
        raise Unavailable("this system does not tell the peak memory of a process") from error
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
        reset_high_water()
        before = resident_bytes()
        result = step()
        peak = high_water_bytes()
    del result
    return max(0, peak - before)


def measure_peaks(
    contender: Contender, works: Sequence[Workload], *, threads: int = 1, timeout: float = 1800
) -> Iterator[tuple[Workload, int | None, str]]:
    """Peak memory of one contender for several workloads, short ones first, in a child process.

    Args:
        timeout: Seconds for one workload.
    Yields: (workload, bytes, ""), or (workload, `None`, the reason).
    """
    if not works:
        return
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(contender, list(works), threads, sender), daemon=True)
    before = dict(os.environ)
    os.environ.update(CHILD_ENVIRONMENT, OMP_NUM_THREADS=str(threads))
    child.start()
    os.environ.clear()
    os.environ.update(before)
    sender.close()
    failure = ""
    for work in works:
        if failure:
            yield work, None, "an earlier length failed"
            continue
        try:
            if receiver.poll(timeout):
                yield work, *receiver.recv()
                continue
            failure = f"longer than {timeout:.0f} s"
        except EOFError:
            child.join()
            # Linux ends a process that takes too much memory with signal 9.
            failure = "out of memory" if child.exitcode == -9 else f"the process ended with {child.exitcode}"
        yield work, None, failure
    child.kill()
    child.join()


def _answer(contender: Contender, works: list[Workload], threads: int, answers: Connection) -> None:
    """The child's side: send (bytes, reason) for every workload."""
    torch.set_num_threads(threads)
    warm_up = replace(works[0], tokens=min(WARM_UP_TOKENS, works[0].tokens))
    for index, work in enumerate([warm_up, *works]):
        try:
            step = make_step(contender.build(work), make_inputs(work), work)
            step()  # what is made once, like tables and weights, is not part of a step
            found: tuple[int | None, str] = peak_bytes(step, work.device), ""
        except Exception as error:
            found = None, explain(error)
        if index:
            answers.send(found)
