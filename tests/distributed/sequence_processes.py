"""Processes that share a sequence, on the CPU: forked, so that what is imported need not be imported again."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_linattn.distributed.collectives import SequenceGroup

Work = Callable[[SequenceGroup, Any], Any]


@contextmanager
def processes(count: int, work: Work, folder: Path, *, timeout: float = 120) -> Iterator[Callable[[Any], list[Any]]]:
    """`count` processes in one group, which do `work(group, task)` together whenever they are asked to.

    Yields: a function of the task, which may be anything that pickles. It gives what each process gives, by rank, and
    fails if one of them raises or takes longer than `timeout` seconds: they may wait for each other forever.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe() for _ in range(count)]
    children = [
        fork.Process(target=_serve, args=(rank, count, work, folder, pipe[1]), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for child in children:
        child.start()

    def ask(task: Any) -> list[Any]:
        for ours, _ in pipes:
            ours.send(task)
        found = []
        for rank, (ours, _) in enumerate(pipes):
            assert ours.poll(timeout), f"process {rank} of {count} took more than {timeout} s for {task!r}"
            result, error = ours.recv()
            assert error is None, f"process {rank} of {count}, {task!r}:\n{error}"
            found.append(result)
        return found

    try:
        yield ask
    finally:
        for child in children:
            child.kill()
            child.join()


def run_processes(
    count: int, work: Callable[[SequenceGroup], Any], folder: Path, *, timeout: float = 120
) -> list[Any]:
    """Let `count` processes do `work` once. Returns: what each gives, by rank. Fails as `processes` says."""
    with processes(count, lambda group, task: work(group), folder, timeout=timeout) as ask:
        return ask(None)


def _serve(rank: int, count: int, work: Work, folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)  # first: threads of the parent are not here
    init, limit = f"file://{folder.resolve()}/rendezvous-{os.getppid()}", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=count, timeout=limit)
    assert dist.group.WORLD is not None
    group = SequenceGroup(dist.group.WORLD)
    while True:
        task, result, error = pipe.recv(), None, None
        try:
            result = work(group, task)
        except Exception:
            error = traceback.format_exc()
        pipe.send((result, error))
