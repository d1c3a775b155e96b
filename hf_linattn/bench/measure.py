"""Timing of several callables against each other, and the arithmetic on the results."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .cases import Unavailable

Call = Callable[[], object]
SHORTEST_SAMPLE = 2e-3  # seconds: a call that takes less is repeated within one sample


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one callable.

    Args:
        samples: One entry per round, in the order in which they were taken.
        calls: Calls in each sample; a sample is their mean.
    """

    samples: tuple[float, ...]
    calls: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)


@dataclass(frozen=True)
class Failure:
    """Why a callable has no timing."""

    reason: str


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    device: str = "cpu",
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing | Failure]:
    """Time callables in turns: every round samples each of them, so that a disturbance meets all.

    Each is called once or twice before anything counts. Then there are at least `min_rounds` rounds (3 where the
    slowest call takes longer than `seconds`, 2 where it takes ten times that), and more until `seconds` per callable
    are spent. In a round a fast callable takes up to five samples while the slowest takes one. A callable that raises
    is out of the race, with the reason.

    Args:
        clock: Replaces the clock on a CPU, for tests. A CUDA device is timed by its own events.
    Returns: One entry per callable, in the order given.
    """
    is_cuda = torch.device(device).type == "cuda"
    found: dict[str, Timing | Failure] = {}
    number: dict[str, int] = {}
    samples: dict[str, list[float]] = {}
    once: dict[str, float] = {}

    def sample(name: str, repeats: int) -> float | None:
        try:
            return _cuda_sample(calls[name], repeats) if is_cuda else _cpu_sample(calls[name], repeats, clock)
        except Exception as error:
            found[name] = Failure(explain(error))
            return None

    for name in calls:
        took = sample(name, 1)
        if took is not None and took < seconds:
            took = sample(name, 1)  # the first call also set things up
        if took is not None:
            once[name], samples[name] = took, []
            number[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(took, 1e-7)))
    if samples:
        slowest = max(once.values())
        rounds = min_rounds if slowest <= seconds else min(min_rounds, 3 if slowest <= 10 * seconds else 2)
        per_round = {n: max(1, min(5, int(slowest / 10 / (once[n] * number[n])))) for n in samples}
        planned = sum(once[n] * number[n] * per_round[n] for n in samples)
        rounds = max(rounds, min(max_rounds, int(seconds * len(samples) / max(planned, 1e-9))))
        for _ in range(rounds):
            for name in list(samples):
                for _ in range(per_round[name]):
                    took = sample(name, number[name])
                    if took is None:
                        del samples[name]
                        break
                    samples[name].append(took)
    found |= {name: Timing(tuple(taken), number[name]) for name, taken in samples.items()}
    return {name: found[name] for name in calls}


def _cpu_sample(call: Call, repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _cuda_sample(call: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def explain(error: BaseException) -> str:
    """One line for a table: what kind of failure, and its first sentence."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    if isinstance(error, Unavailable):
        return lines[0]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def ratio(reference: float, ours: float) -> float:
    """How many times faster `ours` is: the reference's seconds divided by ours."""
    return reference / ours


def slope(points: Iterable[tuple[float, float]], *, start: float = 0.0) -> float | None:
    """Exponent p of the power law cost ~ tokens^p: least squares through the logarithms of (tokens, cost).

    Args:
        start: Only points with at least so many tokens count.
    Returns: `None` with fewer than two different token counts, or where a cost is not positive.
    """
    chosen = [(tokens, cost) for tokens, cost in points if tokens >= start]
    if len({tokens for tokens, _ in chosen}) < 2 or any(cost <= 0 or tokens <= 0 for tokens, cost in chosen):
        return None
    xs, ys = [math.log(tokens) for tokens, _ in chosen], [math.log(cost) for _, cost in chosen]
    return statistics.linear_regression(xs, ys).slope


def upper_lengths(lengths: Sequence[int], span: int = 16) -> int:
    """Where the slope starts: the upper lengths, those within a factor of 16 of the longest (4096 of 65536)."""
    return max(lengths) // span if lengths else 0
