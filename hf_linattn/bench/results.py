"""What a run found: rows, what can be computed from them, and their JSON form."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .workload import Workload

SCHEMA = 1
UPPER_SPAN = 16  # a slope is over the lengths within this factor of the longest


@dataclass
class Row:
    """One contender at one workload.

    Args:
        benchmark: "attention", "memory", "models" or "generation".
        name, group: Those of the `Contender`.
        model: Which model, in "models" and "generation".
        median, minimum: Seconds per call (a training step, if the workload says so); `None` if not measured. In
            "generation", where some steps do more than others, of the means of whole windows of steps.
        samples: How many measurements the median is of.
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
    state: int | None = None
    reason: str = ""
    settings: dict[str, Any] | None = None

    @property
    def cost(self) -> float | None:
        """Seconds, or bytes in "memory"; `None` if not measured."""
        return self.peak if self.benchmark == "memory" else self.median

    @property
    def tokens_per_second(self) -> float | None:
        tokens = self.work.batch * (1 if self.benchmark == "generation" else self.work.tokens)
        return tokens / self.cost if self.cost else None

    @property
    def panel(self) -> str:
        """The title of the table: what its rows have in common, which is all but the contender and the length."""
        work = self.work
        parts = {
            "attention": ("attention", work.direction, work.dtype, work.mode),
            "memory": ("peak memory of a training step", work.direction, work.dtype),
            "models": (self.model, work.direction, work.dtype, work.mode),
            "generation": ("generation", self.model, work.dtype),
        }
        return ", ".join(parts[self.benchmark])

    def to_dict(self) -> dict[str, Any]:
        """Without what is empty."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """Inverse of `to_dict`; also reads rows of version 0.1, where `median` was that of single steps."""
        values = {**values, "work": Workload(**values["work"])}
        if "mean" in values:
            values["median"] = values.pop("mean")
        return cls(**values)


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

    def panels(self) -> dict[str, list[Row]]:
        """Rows by table, in the order in which they were measured."""
        return grouped(self.rows, lambda row: row.panel)

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


def grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows with the same key, in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def by_name(rows: Iterable[Row]) -> dict[str, list[Row]]:
    return grouped(rows, lambda row: row.name)


def lengths(rows: Iterable[Row]) -> list[int]:
    return sorted({row.work.tokens for row in rows})


def slope(rows: Sequence[Row], start: int = 1) -> float | None:
    """Exponent p of the power law cost ~ tokens^p: least squares through the logarithms of (tokens, cost).

    Args:
        rows: Those of one contender.
        start: The shortest length that counts.
    Returns: `None` if there are fewer than two lengths, or one of them was not measured: a slope over other lengths
        is no comparison.
    """
    rows = [row for row in rows if row.work.tokens >= start]
    if len(lengths(rows)) < 2:
        return None
    costs = [math.log(row.cost) for row in rows if row.cost]
    if len(costs) < len(rows):
        return None
    return statistics.linear_regression([math.log(row.work.tokens) for row in rows], costs).slope


def reasons(rows: Iterable[Row]) -> list[str]:
    """What could not be measured and why, once for each contender and reason."""
    return list(dict.fromkeys(f"{row.name}: {row.reason}" for row in rows if row.reason))
