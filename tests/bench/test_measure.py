"""Timing in turns, and the arithmetic on times."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_linattn.bench.cases import Unavailable
from hf_linattn.bench.measure import Failure, Timing, explain, slope, time_interleaved, upper_lengths

COSTS = st.floats(1e-6, 1e6)


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

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


@given(exponent=st.floats(-3, 3), factor=COSTS, tokens=st.lists(st.integers(1, 10**6), min_size=2, unique=True))
def test_slope_is_the_exponent_of_a_power_law(exponent: float, factor: float, tokens: list[int]) -> None:
    found = slope([(n, factor * n**exponent) for n in tokens])
    spread = math.log(max(tokens) / min(tokens))
    assert found == pytest.approx(exponent, abs=1e-9 / spread + 1e-9)


@given(points=st.lists(st.tuples(st.integers(1, 10**5), COSTS), min_size=2, max_size=8), factor=COSTS)
def test_slope_does_not_depend_on_the_unit(points: list[tuple[int, float]], factor: float) -> None:
    before, after = slope(points), slope([(n, cost * factor) for n, cost in points])
    assert before is after is None or before == pytest.approx(after, rel=1e-6, abs=1e-6)


def test_slope_only_of_the_upper_lengths() -> None:
    points = [(256, 1.0), (4096, 1.0), (8192, 2.0), (16384, 4.0)]
    assert slope(points, start=4096) == pytest.approx(1.0)
    assert slope(points) < 0.9
    assert slope(points[:1]) is None
    assert slope([(1, 0.0), (2, 1.0)]) is None
    assert upper_lengths([256, 65536]) == 4096
    assert upper_lengths([]) == 0


def test_median_and_minimum() -> None:
    timing = Timing((5.0, 1.0, 2.0, 9.0))
    assert (timing.median, timing.minimum) == (3.5, 1.0)


def test_every_round_times_everything() -> None:
    clock = Clock()
    calls = {"slow": clock.call("slow", 0.5), "fast": clock.call("fast", 0.2)}
    found = time_interleaved(calls, seconds=4.0, min_rounds=5, clock=clock)
    assert list(found) == ["slow", "fast"]
    assert found["slow"].median == pytest.approx(0.5)
    assert found["fast"].median == pytest.approx(0.2)
    assert len(found["slow"].samples) == len(found["fast"].samples) >= 5
    assert clock.log[4:8] == ["slow", "fast", "slow", "fast"]  # after two calls of each that do not count
    assert sum(map(sum, (found["slow"].samples, found["fast"].samples))) <= 8.0 + 0.7


def test_slow_calls_are_not_repeated_without_end() -> None:
    clock = Clock()
    found = time_interleaved({"slow": clock.call("slow", 100.0)}, seconds=1.0, clock=clock)
    assert len(found["slow"].samples) == 2
    assert len(clock.log) == 3  # one that does not count


def test_fast_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    calls = {"fast": clock.call("fast", 1e-4), "slow": clock.call("slow", 0.5)}
    found = time_interleaved(calls, seconds=0.5, min_rounds=5, clock=clock)
    assert found["fast"].median == pytest.approx(1e-4)
    assert found["fast"].calls * 1e-4 >= 2e-3 - 1e-9
    assert len(found["fast"].samples) == 5 * len(found["slow"].samples)


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_a_failure_is_a_result(fails_at: int) -> None:
    clock = Clock()
    calls = {"bad": clock.call("bad", 0.1, fails_at), "good": clock.call("good", 0.1)}
    found = time_interleaved(calls, seconds=1.0, clock=clock)
    assert found["bad"] == Failure("RuntimeError: broken")
    assert isinstance(found["good"], Timing)


def test_nothing_to_time() -> None:
    assert time_interleaved({}) == {}


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
