"""Findings from several processes at once: compiling kernels is what takes most of the time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from hf_linattn.bench.timing import explain
from isolated import Finding

Run = Callable[[Any, str], Iterator[Finding]]

_NEW = multiprocessing.get_context("spawn")  # a fork of a process that has counted GPUs can use none


def in_processes(run: Run, context: Any, names: Sequence[str], workers: int) -> Iterator[Finding]:
    """What `run(context, name)` yields, for every name in one of several processes, as it comes.

    A process does one name after another, since its imports take as long as some kernels. An error that breaks its
    GPU context (an illegal address) or the process itself fails one name: after any error the next is done by a new
    process.

    Args:
        run: A function of a module, since it crosses a process border.
    """
    waiting = list(names)
    running = dict(_start(run, context) for _ in names[:workers])
    doing: dict[Connection, str] = {}
    while waiting or doing:
        for pipe in [pipe for pipe in running if pipe not in doing]:
            if waiting:
                doing[pipe] = waiting.pop(0)
                pipe.send(doing[pipe])
        for pipe in wait(list(doing)):  # type: ignore[assignment]
            try:
                finding, is_over = pipe.recv()
            except EOFError:  # without a last word
                running[pipe].join()
                code = running[pipe].exitcode
                reason = f"the process ended with {code}"
                finding, is_over = {"kernel": doing[pipe], "failed": True, "reason": reason}, True
            if finding is not None:
                yield finding
            if is_over:
                del doing[pipe]
            if is_over and finding is not None:  # an error
                _end(pipe, running.pop(pipe))
                running.update([_start(run, context)] if waiting else [])
    for pipe, process in running.items():
        _end(pipe, process)


def _start(run: Run, context: Any) -> tuple[Connection, Any]:
    ours, theirs = _NEW.Pipe()
    process = _NEW.Process(target=_work, args=(run, context, theirs), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _end(pipe: Connection, process: Any) -> None:
    pipe.close()
    process.join(5)
    process.kill()


def _work(run: Run, context: Any, pipe: Connection) -> None:
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        try:
            for finding in run(context, name):
                pipe.send((finding, False))
            pipe.send((None, True))
        except Exception as error:
            pipe.send(({"kernel": name, "failed": True, "reason": explain(error)}, True))
            return
