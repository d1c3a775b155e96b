"""From pairs of samples to a ratio with an interval, and to a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

CONFIDENCE = 0.95
MEAN_LIMIT, FIGURE_LIMIT = 1.03, 1.10

Pair = tuple[float, float]  # seconds before, seconds after, measured one after the other


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval for the median from order statistics: no assumption about the distribution.

    With fewer than six values it is their whole range, which holds with less than the confidence.
    """
    ordered, n = sorted(values), len(values)
    rank, below = 0, 0.0  # P(at most `rank` values lie below the median)
    while rank < n // 2:
        below += math.comb(n, rank) / 2**n
        if 2 * below > 1 - confidence:
            break
        rank += 1
    cut = max(rank - 1, 0)
    return ordered[cut], ordered[n - 1 - cut]


@dataclass
class Comparison:
    """One figure: pairs of samples, session by session. In each session both processes are new ones."""

    name: str
    group: str
    sessions: dict[int, list[Pair]] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)  # "before" or "after" -> why it was not measured

    def add(self, session: int, pairs: Sequence[Pair]) -> None:
        self.sessions.setdefault(session, []).extend(pairs)

    @property
    def pairs(self) -> list[Pair]:
        return [pair for pairs in self.sessions.values() for pair in pairs]

    @property
    def ratio(self) -> float:
        """Median of after / before over all pairs."""
        return statistics.median(after / before for before, after in self.pairs)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the median, widened to the medians of the sessions.

        Two processes of the same code differ for as long as they live (where their memory lies, for one thing): pairs
        from one session are not independent of each other.
        """
        low, high = median_interval([after / before for before, after in self.pairs])
        each = [statistics.median(after / before for before, after in pairs) for pairs in self.sessions.values()]
        return min(low, *each), max(high, *each)

    @property
    def ratio_of_minima(self) -> float:
        """Of the fastest samples of each side, which a disturbance of the machine does not reach."""
        before, after = (min(side) for side in zip(*self.pairs, strict=True))
        return after / before

    @property
    def verdict(self) -> str:
        """One of "fine", "slower" (than allowed), "unsettled" (slower, but perhaps by noise), "not measured".

        What is slower is so in the median and in the minimum.
        """
        if not self.sessions:
            return "not measured"
        if min(self.ratio, self.ratio_of_minima) <= FIGURE_LIMIT:
            return "fine"
        return "slower" if self.interval[0] > FIGURE_LIMIT else "unsettled"

    @property
    def is_doubtful(self) -> bool:
        """Whether more samples could change the verdict."""
        if not self.sessions:
            return False
        low, high = self.interval
        return low <= FIGURE_LIMIT < high and max(self.ratio, self.ratio_of_minima) > (1 + FIGURE_LIMIT) / 2

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "group": self.group, "verdict": self.verdict}
        if not self.sessions:
            return {**row, "reason": self.reason}
        before, after = (min(side) for side in zip(*self.pairs, strict=True))
        return {
            **row,
            "ratio": round(self.ratio, 4),
            "interval": [round(end, 4) for end in self.interval],
            "ratio_of_minima": round(self.ratio_of_minima, 4),
            "before_seconds": before,
            "after_seconds": after,
            "pairs": len(self.pairs),
        }


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))


@dataclass(frozen=True)
class Summary:
    """What a run says as a whole."""

    mean: float
    worst: Comparison
    slower: list[str]
    unsettled: list[str]
    lost: list[str]  # failing after
    missing: list[str]  # not reached before the time was over

    @property
    def status(self) -> int:
        """Exit status: 0 not worse, 1 worse, 2 no verdict about some figure."""
        if self.mean > MEAN_LIMIT or self.slower or self.lost:
            return 1
        return 2 if self.unsettled or self.missing else 0


def summarize(rows: Sequence[Comparison]) -> Summary:
    """Raises: ValueError if nothing was measured."""
    measured = [row for row in rows if row.sessions]
    if not measured:
        raise ValueError(f"No figure could be measured: {rows[0].reason if rows else 'none was chosen'}")
    return Summary(
        geometric_mean([row.ratio for row in measured]),
        max(measured, key=lambda row: row.ratio),
        [row.name for row in measured if row.verdict == "slower"],
        [row.name for row in measured if row.verdict == "unsettled"],
        [row.name for row in rows if "after" in row.reason],
        [row.name for row in rows if not row.sessions and not row.reason],
    )
