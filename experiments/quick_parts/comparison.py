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
    """One figure: pairs of samples by session, each with new processes; or why a side was not measured."""

    name: str
    sessions: dict[int, list[Pair]] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)  # "before" or "after" -> why

    @property
    def ratios(self) -> list[float]:
        """The median of after / before in each session, smallest first.

        Two processes of the same code differ for as long as they live (where their memory lies, for one thing): pairs
        from one session are not independent of each other.
        """
        return sorted(statistics.median(after / before for before, after in pairs) for pairs in self.sessions.values())

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def fastest(self) -> Pair:
        """The fastest samples of each side, which a disturbance of the machine does not reach."""
        before, after = zip(*(pair for pairs in self.sessions.values() for pair in pairs), strict=True)
        return min(before), min(after)

    @property
    def verdict(self) -> str:
        """What is "slower" than allowed is so in the median, in the minimum and in every session; else "unsettled"."""
        if not self.sessions:
            return "not measured" if self.reason else "not reached"
        before, after = self.fastest
        if min(self.ratio, after / before) <= FIGURE_LIMIT:
            return "fine"
        return "slower" if self.ratios[0] > FIGURE_LIMIT else "unsettled"

    @property
    def is_doubtful(self) -> bool:
        """Whether more samples could change the verdict."""
        return bool(self.sessions) and self.ratios[0] <= FIGURE_LIMIT < self.ratios[-1]

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "verdict": self.verdict}
        if not self.sessions:
            return {**row, "reason": self.reason}
        times = dict(zip(("before_seconds", "after_seconds"), self.fastest, strict=True))
        return {**row, "ratio": self.ratio, "sessions": self.ratios, **times}


def summarize(rows: Sequence[Comparison]) -> tuple[int, str]:
    """The exit status (0 not worse, 1 worse, 2 no verdict about some figure), and the verdict in words.

    Raises: ValueError if nothing was measured.
    """
    measured = [row for row in rows if row.sessions]
    if not measured:
        raise ValueError(f"No figure could be measured: {[row.reason for row in rows]}")
    mean = math.exp(statistics.fmean(math.log(row.ratio) for row in measured))
    worst = max(measured, key=lambda row: row.ratio)
    lost = [row.name for row in rows if "after" in row.reason]
    by_verdict = {what: [r.name for r in rows if r.verdict == what] for what in ("slower", "unsettled", "not reached")}
    lines = [f"geometric mean {mean:.3f} (at most {MEAN_LIMIT})"]
    lines.append(f"worst figure {worst.ratio:.3f} (at most {FIGURE_LIMIT}): {worst.name}")
    lines += [f"{what}: {'; '.join(names)}" for what, names in {**by_verdict, "failing after": lost}.items() if names]
    if mean > MEAN_LIMIT or by_verdict["slower"] or lost:
        return 1, "\n".join(lines)
    return 2 if by_verdict["unsettled"] or by_verdict["not reached"] else 0, "\n".join(lines)
