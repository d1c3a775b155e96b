"""Timing of several callables against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Measurement, Timer, timer

from .workload import Unavailable

ROUNDS, SLOW_ROUNDS = 5, 2


@dataclass(frozen=True)
class Failure:
    """Why a callable has no measurement."""

    reason: str


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = timer,
) -> dict[str, Measurement | Failure]:
    """Time callables in turns: each of them in every round, so that a disturbance meets all.

    A callable is called once before anything counts. It has `seconds` altogether; one that takes longer than that for
    a single call is timed in two rounds. One that raises is out, with the reason. The default clock is PyTorch's,
    which waits for a CUDA device.
    """
    taken: dict[str, list[Measurement]] = {name: [] for name in calls}
    failed: dict[str, Failure] = {}
    for number in range(rounds):
        for name, members in taken.items():
            if name in failed or (number >= SLOW_ROUNDS and members[0].median > seconds):
                continue
            watch = Timer("call()", globals={"call": calls[name]}, timer=clock, num_threads=torch.get_num_threads())
            try:
                if not number:
                    calls[name]()  # the first call also sets things up
                members.append(watch.blocked_autorange(min_run_time=seconds / rounds))
            except Exception as error:
                failed[name] = Failure(explain(error))
    return {name: failed.get(name) or Measurement.merge(members)[0] for name, members in taken.items()}


def explain(error: BaseException) -> str:
    """One line for a table: what kind of failure, and its first sentence."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    first = str(error).strip().partition("\n")[0][:160]
    if isinstance(error, Unavailable):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
