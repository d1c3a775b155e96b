"""Two worker processes that take turns: only one computes at any time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from .comparison import Comparison, Pair
from .figures import Figure

BENCHMARKS = Path(__file__).resolve().parents[1]
SHORTEST_SAMPLE = 0.02  # seconds: a call that takes less is repeated within a sample
FEWEST_PAIRS, MOST_PAIRS = 3, 16  # in one session
PAUSE = 0.003  # seconds, in which threads of the other process that wait for work go to sleep


class MeasurementError(Exception):
    """A worker could not measure a figure; the message says why."""


class Asks(Protocol):
    def ask(self, **request: Any) -> float: ...


class Worker:
    """A process with the package of one checkout. Raises `MeasurementError` if it has another package."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(checkout), str(BENCHMARKS)]),
            "PYTHONHASHSEED": "0",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quick_parts.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=folder,
            env=environment,
            text=True,
        )
        found = Path(self._answer()["package"])
        if found != checkout / "hf_linattn":
            self.close()
            raise MeasurementError(f"{checkout} was to be measured, but Python imports {found}.")

    def ask(self, **request: Any) -> float:
        """Seconds. Raises `MeasurementError` with what the worker says."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise MeasurementError(answer["error"])
        return float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            lines = self.log.read().decode(errors="replace").splitlines()[-3:]
            raise MeasurementError(f"A worker ended with status {self.process.returncode}: {' '.join(lines)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


@contextmanager
def workers(checkouts: Sequence[Path]) -> Iterator[list[Worker]]:
    """New processes, one for each checkout."""
    started: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for checkout in checkouts:
                started.append(Worker(checkout, Path(folder)))
            yield started
        finally:
            for worker in started:
                worker.close()


def take_turns(figure: Figure, before: Asks, after: Asks, seconds: float, *, swap: bool = False) -> list[Pair]:
    """Pairs of samples of one figure; who goes first alternates. Raises `MeasurementError` of the side that fails.

    Args:
        seconds: Time for both, roughly; at least three pairs are taken.
        swap: Let `after` begin.
    """
    sides: dict[str, Asks] = {"before": before, "after": after}
    once = []
    for name, side in sides.items():
        try:
            once.append(side.ask(figure=figure.name))
        except MeasurementError as error:
            raise MeasurementError(name, str(error)) from error
    calls = max(1, math.ceil(SHORTEST_SAMPLE / max(min(once), 1e-7)))
    number = max(FEWEST_PAIRS, min(MOST_PAIRS, int(seconds / (calls * sum(once)))))
    pairs = []
    for index in range(number):
        order = ["after", "before"] if (index % 2 == 1) != swap else ["before", "after"]
        taken = {}
        for name in order:
            time.sleep(PAUSE)
            taken[name] = sides[name].ask(figure=figure.name, calls=calls)
        pairs.append((taken["before"], taken["after"]))
    return pairs


def run_session(
    session: int,
    figures: Iterable[Figure],
    rows: dict[str, Comparison],
    both: Sequence[Asks],
    seconds: float,
    end: float = math.inf,
) -> None:
    """Add one session to the rows of the given figures, until the monotonic clock is past `end`.

    A figure that fails is noted in its row.
    """
    for figure in figures:
        if time.monotonic() > end:
            return
        row = rows[figure.name]
        try:
            row.add(session, take_turns(figure, both[0], both[1], seconds, swap=session % 2 == 1))
        except MeasurementError as error:
            row.reason[error.args[0]] = error.args[-1]
