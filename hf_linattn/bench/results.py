"""What a run found: rows, what can be computed from them, and their JSON form."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .workload import Workload

SCHEMA = 1
BENCHMARKS = ("attention", "memory", "models", "generation")
UPPER_SPAN = 16  # a slope is over the lengths within this factor of the longest
Panel = tuple[str, str, bool, str, str]


@dataclass(frozen=True)
class Row:
    """One contender at one workload.

    Args:
        benchmark: One of `BENCHMARKS`.
        name, group: Those of the `Contender`.
        model: Which model, in "models" and "generation".
        median, minimum: Seconds per call (a training step, if the workload says so); `None` if not measured.
        mean: Seconds per step in "generation", where some steps do more than others: the median of the rounds' means.
        samples: How many measurements the median or the mean is of.
        ratio: Seconds of the fastest softmax attention at the same workload over the row's: above 1 is faster.
        peak: Bytes held at most during a step, in "memory".
        state: Bytes that the cache holds at most per layer, in "generation".
        reason: Why there is no number, if there is none.
        settings: The kind's settings.
    """

    benchmark: str
    name: str
    group: str
    work: Workload
    model: str = ""
    median: float | None = None
    minimum: float | None = None
    samples: int = 0
    ratio: float | None = None
    peak: int | None = None
    mean: float | None = None
    state: int | None = None
    reason: str = ""
    settings: dict[str, Any] | None = None

    @property
    def cost(self) -> float | None:
        """Seconds, or bytes in "memory"; `None` if not measured."""
        return {"memory": self.peak, "generation": self.mean}.get(self.benchmark, self.median)

    @property
    def tokens_per_second(self) -> float | None:
        tokens = self.work.batch * (1 if self.benchmark == "generation" else self.work.tokens)
        return tokens / self.cost if self.cost else None

    @property
    def panel(self) -> Panel:
        """What rows of one table or plot have in common: everything but the contender and the length."""
        return self.benchmark, self.model, self.work.is_causal, self.work.dtype, self.work.mode

    def to_dict(self) -> dict[str, Any]:
        """Without what is empty."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        return cls(**{**values, "work": Workload(**values["work"])})


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Rows of one workload, each with its ratio to the fastest softmax attention among them, if one was measured."""
    best = min((row.cost for row in rows if row.group == "softmax" and row.cost), default=None)
    return [replace(row, ratio=best / row.cost) if best and row.cost else row for row in rows]


@dataclass(frozen=True)
class Results:
    """One run.

    Args:
        command: The command line that made it.
        environment: `environment.describe()`.
        options: The options of the run, as plain values.
        is_complete: Whether the run came to its end; the file is also written on the way.
    """

    rows: tuple[Row, ...]
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    is_complete: bool = True

    def panels(self, benchmark: str | None = None) -> dict[Panel, list[Row]]:
        """Rows by table, in the order in which they were measured."""
        found: dict[Panel, list[Row]] = {}
        for row in self.rows:
            if benchmark in (None, row.benchmark):
                found.setdefault(row.panel, []).append(row)
        return found

    def write(self, path: Path) -> None:
        content = {"schema": SCHEMA, **vars(self), "rows": [row.to_dict() for row in self.rows]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Inverse of `write`. Raises `CheckpointError` for another schema or a file of something else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            schema = content.pop("schema")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError("These are not benchmark results: no JSON object with a 'schema'.") from error
        if schema != SCHEMA:
            raise CheckpointError(
                f"Benchmark results must have schema {SCHEMA}; got {schema!r}. Run the benchmark again with this"
                " version, or read the file with the version that wrote it."
            )
        try:
            return cls(tuple(Row.from_dict(row) for row in content.pop("rows")), **content)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"These benchmark results are incomplete or not of attention: {error}.") from error


def names(rows: Iterable[Row]) -> list[str]:
    """Contenders in order of appearance."""
    return list(dict.fromkeys(row.name for row in rows))


def lengths(rows: Iterable[Row]) -> list[int]:
    return sorted({row.work.tokens for row in rows})


def slope(points: Sequence[tuple[int, float]]) -> float | None:
    """Exponent p of the power law cost ~ tokens^p: least squares through the logarithms of (tokens, cost).

    Returns: `None` with fewer than two different token counts.
    """
    if len({tokens for tokens, _ in points}) < 2:
        return None
    xs, ys = ([math.log(value) for value in side] for side in zip(*points, strict=True))
    return statistics.linear_regression(xs, ys).slope


def growth(rows: Sequence[Row], name: str) -> float | None:
    """Slope of one contender's cost over the upper lengths of a panel: within a factor of 16 of the longest.

    `None` if it was not measured at all of them: a slope over other lengths is no comparison.
    """
    start = max(lengths(rows)) // UPPER_SPAN
    upper = [row for row in rows if row.name == name and row.work.tokens >= start]
    points = [(row.work.tokens, row.cost) for row in upper if row.cost]
    return slope(points) if len(points) == len(upper) else None


def crossover(rows: Sequence[Row]) -> int | None:
    """The shortest measured length from which on a contender is at least as fast as the best softmax."""
    compared = {row.work.tokens: row.ratio for row in rows if row.ratio}
    slower = max((tokens for tokens, ratio in compared.items() if ratio < 1), default=0)
    return min((tokens for tokens in compared if tokens > slower), default=None)


def reasons(rows: Sequence[Row]) -> list[str]:
    """What could not be measured and why: one line per contender and reason, with the lengths if only at some."""
    found: dict[tuple[str, str], set[int]] = {}
    measured = {row.name for row in rows if not row.reason}
    for row in rows:
        if row.reason:
            found.setdefault((row.name, row.reason), set()).add(row.work.tokens)
    return [
        f"{name} at {', '.join(map(str, sorted(tokens)))} tokens: {reason}"
        if name in measured
        else f"{name}: {reason}"
        for (name, reason), tokens in found.items()
    ]
