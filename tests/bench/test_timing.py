"""Timing in turns, with a clock that moves only when a call says so."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from hf_linattn.bench.timing import Failure, explain, time_calls, time_in_turns
from hf_linattn.bench.workload import Unavailable


class Clock:
    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float, fails_at: int | None = None):
        count = itertools.count()

        def run() -> None:
            if next(count) == fails_at:
                raise RuntimeError("broken\nwith details")
            self.log.append(name)
            self.now += seconds

        return run


def test_every_round_times_everything() -> None:
    clock = Clock()
    calls = {"slow": clock.call("slow", 0.5), "fast": clock.call("fast", 0.01)}
    found = time_in_turns(calls, seconds=4.0, measure=partial(time_calls, clock=clock))
    assert list(found) == ["slow", "fast"]
    assert found["slow"].median == pytest.approx(0.5)
    assert found["fast"].median == pytest.approx(0.01)
    assert len(found["fast"].times) > len(found["slow"].times) >= 5
    rounds = [name for name, _ in itertools.groupby(clock.log)]
    assert rounds == ["slow", "fast"] * 5


def test_slow_calls_are_timed_in_two_rounds() -> None:
    clock = Clock()
    found = time_in_turns({"slow": clock.call("slow", 100.0)}, seconds=1.0, measure=partial(time_calls, clock=clock))
    assert len(found["slow"].times) == 2
    assert len(clock.log) <= 5


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_a_failure_is_a_result(fails_at: int) -> None:
    clock = Clock()
    calls = {"bad": clock.call("bad", 0.1, fails_at), "good": clock.call("good", 0.1)}
    found = time_in_turns(calls, seconds=1.0, measure=partial(time_calls, clock=clock))
    assert found["bad"] == Failure("RuntimeError: broken")
    assert found["good"].median == pytest.approx(0.1)
    assert time_in_turns({}, seconds=1.0) == {}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Unavailable("needs a GPU"), "needs a GPU"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (ValueError(), "ValueError"),
    ],
)
def test_reasons_are_short(error: Exception, text: str) -> None:
    assert explain(error) == text
