"""Peak memory of one step.

On a CPU it is the high-water mark of the process's resident memory over what it held before the step: everything
counts, also what a library takes without telling PyTorch. Linux can reset that mark between steps (writing 5 to
`/proc/self/clear_refs`); elsewhere every step needs a process of its own. Both run in a fresh child process, whose
allocator is told to give large blocks back at once, so that the mark does not remember earlier steps. On CUDA it is
what PyTorch's allocator counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .cases import Implementation, Unavailable, Workload, make_inputs, make_step
from .measure import explain
from .ours import KindOptions, kind_implementation
from .peers import PEERS, peer_implementations

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc keeps freed blocks below a threshold that grows by itself; fixed, large tensors go back at once.
CHILD_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
WARM_UP_TOKENS = 512


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes held at once during `step`, beyond those held before it. What `step` returns counts.

    Raises: `Unavailable` on a CPU whose system does not tell.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    elif can_reset():
        _trim()
        RESET.write_text("5")
        before = _status("VmRSS")
        result = step()
        peak = _status("VmHWM") - before
    else:
        before = _lifetime_peak()
        result = step()
        peak = _lifetime_peak() - before
    del result
    return max(0, peak)


def can_reset() -> bool:
    """Whether the high-water mark of this process can be set back."""
    try:
        RESET.write_text("5")
        return _status("VmHWM") > 0
    except (OSError, KeyError, ValueError):
        return False


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


def _lifetime_peak() -> int:
    try:
        import resource
    except ImportError as error:
        raise Unavailable("this system does not tell the peak memory of a process") from error
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _trim() -> None:
    """Give free memory back to the system, where the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass


# -- in a process of its own ------------------------------------------------------------------------------------------
def measure_peaks(
    name: str,
    kind_options: KindOptions | None,
    works: Sequence[Workload],
    *,
    threads: int = 1,
    num_features: int = 256,
    timeout: float = 1800,
) -> Iterator[tuple[Workload, int | None, str]]:
    """Peak memory of one implementation for several workloads, in child processes.

    Args:
        name: A kind, if it has `kind_options`, or the name of a peer's implementation.
        num_features: Of a peer with random features.
        timeout: Seconds for one child.
    Yields: (workload, bytes, ""), or (workload, `None`, the reason).
    """
    if not works:
        return
    groups = [list(works)] if can_reset() or _is_cuda(works) else [[work] for work in works]
    for group in groups:
        request = {
            "name": name,
            "options": asdict(kind_options) if kind_options else None,
            "works": [work.to_dict() for work in group],
            "threads": threads,
            "num_features": num_features,
        }
        answers, failure = _ask(request, timeout)
        for index, work in enumerate(group):
            if index < len(answers):
                yield work, answers[index]["bytes"], answers[index]["reason"]
            else:  # the child ended at this one, and never came to the next
                yield work, None, failure if index == len(answers) else "an earlier length failed"


def _is_cuda(works: Sequence[Workload]) -> bool:
    return any(torch.device(work.device).type == "cuda" for work in works)


def _ask(request: dict[str, Any], timeout: float) -> tuple[list[dict[str, Any]], str]:
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
    threads = str(request["threads"])
    environment = {**os.environ, **CHILD_ENVIRONMENT, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "hf_linattn.bench.memory", json.dumps(request)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        output, failure = done.stdout, f"the process ended with {done.returncode}" if done.returncode else ""
        if done.returncode == -9:
            failure = "out of memory"  # how Linux ends a process that takes too much
    except subprocess.TimeoutExpired as expired:
        raw = expired.stdout or b""
        output, failure = (raw if isinstance(raw, str) else raw.decode()), f"longer than {timeout:.0f} s"
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], failure or "no answer"


def answer(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The child's side: one dictionary per workload."""
    torch.set_num_threads(request["threads"])
    works = [Workload(**work) for work in request["works"]]
    implementation = find(request["name"], request["options"], works[0].device, request["num_features"])
    warm_up = Workload(**{**works[0].to_dict(), "tokens": min(WARM_UP_TOKENS, works[0].tokens)})
    for index, work in enumerate([warm_up, *works]):
        found: dict[str, Any] = {"bytes": None, "reason": ""}
        try:
            step = make_step(implementation.build(work), make_inputs(work), work)
            step()  # what is made once, like tables and weights, is not part of a step
            found["bytes"] = peak_bytes(step, work.device)
        except Exception as error:
            found["reason"] = explain(error)
        if index:
            yield found


def find(name: str, options: dict[str, Any] | None, device: str, num_features: int) -> Implementation:
    """The implementation behind a name that crossed a process border."""
    if options is not None:
        return kind_implementation(name, KindOptions(**options))
    peers = peer_implementations(PEERS, device, num_features)
    return next(peer for peer in peers if peer.name == name)


if __name__ == "__main__":
    for line in answer(json.loads(sys.argv[1])):
        print(json.dumps(line), flush=True)
