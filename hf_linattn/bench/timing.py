"""Timing of several callables against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Measurement, Timer, timer

from .workload import Unavailable

ROUNDS, SLOW_ROUNDS = 5, 2


@dataclass(frozen=True)
class Failure:
    """Why a callable has no measurement."""

    reason: str


def time_calls(call: Callable[[], object], seconds: float, clock: Callable[[], float] = timer) -> Measurement:
    """Call again and again for so many seconds. The default clock is PyTorch's, which waits for a CUDA device."""
    watch = Timer("call()", globals={"call": call}, timer=clock, num_threads=torch.get_num_threads())
    return watch.blocked_autorange(min_run_time=seconds)


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    measure: Callable[[Any, float], Measurement] = time_calls,
) -> dict[str, Measurement | Failure]:
    """Time callables in turns: each of them in every round, so that a disturbance meets all.

    Args:
        seconds: Time for each callable altogether. One whose first measurement takes longer is timed in two rounds.
        measure: One measurement, from the callable and its seconds in this round.
    Returns: All measurements of a callable as one; or, if it raised, a `Failure`.
    """
    taken: dict[str, list[Measurement]] = {name: [] for name in calls}
    failed: dict[str, Failure] = {}
    for number in range(ROUNDS):
        for name, found in taken.items():
            if name in failed or (number >= SLOW_ROUNDS and sum(found[0].raw_times) > seconds):
                continue
            try:
                if not number:
                    calls[name]()  # the first call also sets things up
                found.append(measure(calls[name], seconds / ROUNDS))
            except Exception as error:
                failed[name] = Failure(explain(error))
    return {name: failed.get(name) or Measurement.merge(found)[0] for name, found in taken.items()}


def explain(error: BaseException) -> str:
    """One line for a table: what kind of failure, and its first sentence."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    first = str(error).strip().partition("\n")[0][:160]
    if isinstance(error, Unavailable):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
