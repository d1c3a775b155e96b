"""Several processes on one machine, forked so that nothing is imported again."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from torch import Tensor

SECONDS = 300  # after which a run counts as hanging


def in_processes(
    folder: Path, count: int, function: Callable[..., dict[str, Tensor]], *args: Any, launched: bool = False
) -> list[dict[str, Tensor]]:
    """The tensors that `function(*args)` returns in each of `count` processes, which share a group (gloo).

    Args:
        launched: As a launcher starts a training run: with its variables, and one process has no group.

    Raises: AssertionError with the traceback of one that fails, or if they hang.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("process-*"):
        path.unlink()
    context = multiprocessing.get_context("fork")
    work = (folder, count, launched, function, args)
    started = [context.Process(target=_work, args=(rank, *work)) for rank in range(count)]
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
    for process in started:
        process.join()
    told = [path.read_text() for path in sorted(folder.glob("process-*-error"))]
    assert not told, told[0]
    assert not hanging, f"{len(hanging)} of {count} processes hang"
    assert not any(process.exitcode for process in started), [process.exitcode for process in started]
    return [load_file(folder / f"process-{rank}-result") for rank in range(count)]


def _work(
    rank: int, folder: Path, count: int, launched: bool, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        if launched:
            _as_launched(rank, count)
        has_group = count > 1 or not launched
        if has_group:
            meeting, limit = f"file://{folder / 'process-meeting'}", datetime.timedelta(seconds=60)
            torch.distributed.init_process_group(
                "gloo", init_method=meeting, rank=rank, world_size=count, timeout=limit
            )
        found = {name: tensor.detach().contiguous().clone() for name, tensor in function(*args).items()}
        save_file(found, folder / f"process-{rank}-result")
        if has_group:
            torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"process-{rank}-error").write_text(traceback.format_exc())
        os._exit(1)


def _as_launched(rank: int, count: int) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.update(ACCELERATE_USE_CPU="true")
    if count > 1:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in environment.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # not used: the group is made here
