"""What a run found: rows, what can be computed from them, and their JSON form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .cases import Workload
from .measure import Failure, Timing, slope, upper_lengths

SCHEMA = 1
BENCHMARKS = ("attention", "memory", "models", "generation")


@dataclass(frozen=True)
class Row:
    """One implementation at one workload.

    Args:
        benchmark: One of `BENCHMARKS`.
        name, group: Those of the `Implementation`.
        model: Which model, in "models" and "generation".
        median, minimum: Seconds per call (a training step, if the workload says so); `None` if not measured. In
            "generation" the median of all steps, and the smallest mean of a run of steps.
        mean: Mean seconds per step in "generation", where some steps do more than others: the median of such means.
        samples: How many measurements the median (in "generation" the mean) is of.
        ratio: Seconds of the fastest softmax attention at the same workload over ours (`cost`): above 1 is faster.
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
    def tokens_per_second(self) -> float | None:
        if self.benchmark == "generation":
            return self.work.batch / self.mean if self.mean else None
        return self.work.batch * self.work.tokens / self.median if self.median else None

    @property
    def panel(self) -> tuple[str, str, bool, str, str]:
        """What rows of one table or plot have in common: everything but the implementation and the length."""
        return self.benchmark, self.model, self.work.is_causal, self.work.dtype, self.work.mode


def timed(row: Row, result: Timing | Failure) -> Row:
    """`row` with what was measured, or why nothing was."""
    if isinstance(result, Failure):
        return replace(row, reason=result.reason)
    return replace(row, median=result.median, minimum=result.minimum, samples=len(result.samples))


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Rows of one workload, each with its ratio to the fastest softmax attention among them, if one was measured."""
    softmax = [seconds for row in rows if row.group == "softmax" and (seconds := cost(row))]
    if not softmax:
        return list(rows)
    best = min(softmax)
    return [replace(row, ratio=best / seconds) if (seconds := cost(row)) else row for row in rows]


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

    def panels(self, benchmark: str | None = None) -> dict[tuple[str, str, bool, str, str], list[Row]]:
        """Rows by table, in the order in which they were measured."""
        found: dict[tuple[str, str, bool, str, str], list[Row]] = {}
        for row in self.rows:
            if benchmark in (None, row.benchmark):
                found.setdefault(row.panel, []).append(row)
        return found

    def to_json(self) -> str:
        content = asdict(self)
        rows = [{k: v for k, v in row.items() if v not in (None, "")} for row in content.pop("rows")]
        return json.dumps({"schema": SCHEMA, **content, "rows": rows}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Inverse of `to_json`. Raises `CheckpointError` for another schema or a file of something else."""
        try:
            content = json.loads(text)
            schema = content.pop("schema")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError("These are not benchmark results: no JSON object with a 'schema'.") from error
        if schema != SCHEMA:
            raise CheckpointError(
                f"Benchmark results must have schema {SCHEMA}; got {schema!r}. Run the benchmark again with this"
                " version, or read the file with the version that wrote it."
            )
        try:
            rows = [Row(**{**row, "work": Workload(**row["work"])}) for row in content.pop("rows")]
            return cls(tuple(rows), **content)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"These benchmark results are incomplete or not of attention: {error}.") from error

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        return cls.from_json(path.read_text(encoding="utf-8"))


def names(rows: Iterable[Row]) -> list[str]:
    """Implementations in order of appearance."""
    return list(dict.fromkeys(row.name for row in rows))


def lengths(rows: Iterable[Row]) -> list[int]:
    return sorted({row.work.tokens for row in rows})


def cost(row: Row) -> float | None:
    """Seconds, or bytes in "memory"."""
    if row.benchmark == "generation":
        return row.mean
    return row.peak if row.benchmark == "memory" else row.median


def growth(rows: Sequence[Row], name: str) -> float | None:
    """Slope of one implementation's cost over the upper lengths of a panel (`upper_lengths`).

    `None` if it was not measured at all of them: a slope over other lengths is no comparison.
    """
    start = upper_lengths(lengths(rows))
    upper = [row for row in rows if row.name == name and row.work.tokens >= start]
    points = [(row.work.tokens, value) for row in upper if (value := cost(row))]
    return slope(points) if len(points) == len(upper) else None


def crossover(rows: Sequence[Row], name: str) -> int | None:
    """The shortest measured length from which on an implementation is at least as fast as the best softmax."""
    found = None
    compared = sorted((row for row in rows if row.name == name and row.ratio), key=lambda row: -row.work.tokens)
    for row in compared:
        if row.ratio is None or row.ratio < 1:
            break
        found = row.work.tokens
    return found


def reasons(rows: Sequence[Row]) -> list[str]:
    """What could not be measured and why: one line per implementation and reason, with the lengths if only at some."""
    found: dict[tuple[str, str], list[int]] = {}
    measured = {row.name for row in rows if not row.reason}
    for row in rows:
        if row.reason:
            found.setdefault((row.name, row.reason), []).append(row.work.tokens)
    lines = []
    for (name, reason), tokens in found.items():
        where = f" at {', '.join(map(str, sorted(set(tokens))))} tokens" if name in measured else ""
        lines.append(f"{name}{where}: {reason}")
    return lines
