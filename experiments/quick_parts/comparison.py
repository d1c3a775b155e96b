"""From pairs of samples, session by session, to a ratio and a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MEAN_LIMIT, FIGURE_LIMIT = 1.03, 1.10
Pair = tuple[float, float]  # seconds before, seconds after, measured one after the other


@dataclass
class Comparison:
    """One figure: pairs of samples by session, each with new processes; or why one side was not measured."""

    name: str
    sessions: dict[int, list[Pair]] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)  # "before" or "after" -> why

    @property
    def ratio(self) -> float:
        """Median of after / before over all pairs."""
        return statistics.median(after / before for pairs in self.sessions.values() for before, after in pairs)

    @property
    def interval(self) -> Pair:
        """From the lowest to the highest median of a session.

        Two processes of the same code differ for as long as they live (where their memory lies, for one thing): pairs
        from one session are not independent of each other.
        """
        each = [statistics.median(after / before for before, after in pairs) for pairs in self.sessions.values()]
        return min(each), max(each)

    @property
    def fastest(self) -> Pair:
        """The fastest samples of each side, which a disturbance of the machine does not reach."""
        before, after = zip(*(pair for pairs in self.sessions.values() for pair in pairs), strict=True)
        return min(before), min(after)

    @property
    def verdict(self) -> str:
        """One of "fine", "slower" (than allowed), "unsettled" (slower, but perhaps by noise), "not measured".

        What is slower is so in the median, in the minimum and in every session.
        """
        if not self.sessions:
            return "not measured"
        before, after = self.fastest
        if min(self.ratio, after / before) <= FIGURE_LIMIT:
            return "fine"
        return "slower" if self.interval[0] > FIGURE_LIMIT else "unsettled"

    @property
    def is_doubtful(self) -> bool:
        """Whether more samples could change the verdict."""
        return bool(self.sessions) and self.interval[0] <= FIGURE_LIMIT < self.interval[1]

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "verdict": self.verdict}
        if not self.sessions:
            return {**row, "reason": self.reason}
        numbers = {"ratio": round(self.ratio, 4), "interval": [round(end, 4) for end in self.interval]}
        times = dict(zip(("before_seconds", "after_seconds"), self.fastest, strict=True))
        return {**row, **numbers, **times, "pairs": sum(map(len, self.sessions.values()))}


@dataclass(frozen=True)
class Summary:
    """What a run says as a whole: the geometric mean of the ratios, the largest one, and figures by what is wrong."""

    mean: float
    worst: Comparison
    wrong: dict[str, list[str]]

    @property
    def status(self) -> int:
        """Exit status: 0 not worse, 1 worse, 2 no verdict about some figure."""
        if self.mean > MEAN_LIMIT or self.wrong["slower than allowed"] or self.wrong["failing in the later version"]:
            return 1
        return 2 if any(self.wrong.values()) else 0

    def __str__(self) -> str:
        lines = [
            f"geometric mean {self.mean:.3f} (at most {MEAN_LIMIT})",
            f"worst figure {self.worst.ratio:.3f} (at most {FIGURE_LIMIT}): {self.worst.name}",
        ]
        return "\n".join(lines + [f"{what}: {'; '.join(names)}" for what, names in self.wrong.items() if names])


def summarize(rows: Sequence[Comparison]) -> Summary:
    """Raises: ValueError if nothing was measured."""
    measured = [row for row in rows if row.sessions]
    if not measured:
        raise ValueError(f"No figure could be measured: {rows[0].reason if rows else 'none was chosen'}")
    wrong = {
        "slower than allowed": [row.name for row in measured if row.verdict == "slower"],
        "failing in the later version": [row.name for row in rows if "after" in row.reason],
        "slower than allowed, but perhaps by noise": [row.name for row in measured if row.verdict == "unsettled"],
        "not reached before the time was over": [row.name for row in rows if not row.sessions and not row.reason],
    }
    mean = math.exp(statistics.fmean(math.log(row.ratio) for row in measured))
    return Summary(mean, max(measured, key=lambda row: row.ratio), wrong)
