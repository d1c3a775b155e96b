"""Findings from several processes at once: compiling kernels is what takes most of the time."""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hf_linattn.bench.timing import explain
from isolated import Finding

Run = Callable[[Any, str], Iterator[Finding]]


def in_processes(run: Run, context: Any, names: Sequence[str], workers: int) -> Iterator[Finding]:
    """What `run(context, name)` yields, for every name in a process of its own, as it comes.

    An error that breaks a process's GPU context (an illegal address) fails one name and no other. Processes are forks
    of one that has imported everything and has not touched the GPU, since an import takes as long as some kernels.

    Args:
        run: A function of a module, since it crosses a process border.
    """
    server = fork_server(run.__module__)
    found: Any = server.Queue()
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            running[name] = server.Process(target=_work, args=(run, context, name, found), daemon=True)
            running[name].start()
        try:
            name, finding = found.get(timeout=0.5)
        except queue.Empty:
            ended = [name for name, process in running.items() if process.exitcode is not None]
            for name in ended if found.empty() else []:  # without a last word
                code = running.pop(name).exitcode
                yield {"kernel": name, "failed": True, "reason": f"the process ended with {code}"}
            continue
        if finding is None:
            running.pop(name, None)
        else:
            yield finding


def fork_server(module: str) -> Any:
    """A context of `multiprocessing` whose processes have imported a module already."""
    # Before Python 3.13 the server knows of no other places, and is silent about a module that it does not find.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([module])
    return server


def _work(run: Run, context: Any, name: str, found: Any) -> None:
    try:
        for finding in run(context, name):
            found.put((name, finding))
    except Exception as error:
        found.put((name, {"kernel": name, "failed": True, "reason": explain(error)}))
    found.put((name, None))
