"""Several processes on one machine, forked so that nothing is imported again, and what they are to compute."""

from __future__ import annotations

import datetime
import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

SECONDS = 240  # after which a run counts as hanging


def run(
    folder: Path, processes: int, function: Callable[..., dict[str, Tensor]], *args: Any
) -> list[dict[str, Tensor]]:
    """The tensors that `function(*args)` returns in each of some processes, which share a group (gloo).

    Raises: AssertionError with the traceback of one that fails, or if they hang.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_work, args=(folder, rank, processes, function, args)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    until = time.monotonic() + SECONDS
    while any(process.is_alive() for process in started) and time.monotonic() < until:
        time.sleep(0.02)
        if any(process.exitcode for process in started):
            break
    hanging = [process for process in started if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    told = [path.read_text() for path in sorted(folder.glob("error*"))]
    assert not told, told[0]
    assert not hanging, f"{len(hanging)} of {processes} processes hang"
    assert all(process.exitcode == 0 for process in started), [process.exitcode for process in started]
    return [load_file(folder / f"result{rank}") for rank in range(processes)]


def _work(folder: Path, rank: int, processes: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'meeting'}",
            rank=rank,
            world_size=processes,
            timeout=datetime.timedelta(seconds=60),
        )
        found = {name: tensor.detach().contiguous().clone() for name, tensor in function(*args).items()}
        save_file(found, folder / f"result{rank}")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise


def share(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a batch that are this process's."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return {name: tensor.tensor_split(size)[rank] for name, tensor in batch.items()}
