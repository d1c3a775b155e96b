"""Processes that share a sequence, on the CPU: forked, so that what is imported need not be imported again."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_linattn.distributed.collectives import SequenceGroup

Work = Callable[[SequenceGroup], Any]


def run_processes(count: int, work: Work, folder: Path, *, timeout: float = 120) -> list[Any]:
    """Let `count` processes do `work`, all in one group. Returns: what each gives, by rank (tensors and containers).

    Fails if one of them raises, or if they take longer than `timeout` seconds: they may wait for each other forever.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = mp.start_processes(_process, (count, work, folder), count, join=False, start_method="fork")
    end = time.monotonic() + timeout
    while not processes.join(timeout=1.0):  # raises what a process has raised
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            raise AssertionError(f"{count} processes took more than {timeout} s: they wait for each other")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank: int, count: int, work: Work, folder: Path) -> None:
    torch.set_num_threads(1)  # first: threads of the parent are not here
    init, limit = f"file://{folder.resolve()}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=count, timeout=limit)
    assert dist.group.WORLD is not None
    torch.save(work(SequenceGroup(dist.group.WORLD)), folder / f"{rank}.pt")
    dist.destroy_process_group()
