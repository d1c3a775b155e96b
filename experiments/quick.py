"""Is one version of the library slower than another? The quick set of figures, before and after, in turns.

    python experiments/quick.py --before v0.1.0                     # this checkout against a revision
    python experiments/quick.py --before ../old --after ../new      # or two folders
    python experiments/quick.py --before HEAD --self-check          # a version against itself: what noise does

Each version has a process, and they take turns at every figure: attention by itself, converted models, generation,
import and conversion; one thread and two. Sessions, each with new processes, go through all figures; those that the
noise leaves in doubt are repeated until the time is over. Exit status: 0 if the geometric mean of after / before is at
most 1.03 and no figure's ratio is above 1.10; 1 if not; 2 if a ratio above 1.10 may be noise or the time was
over before every figure was measured (run it again, on a quieter machine).
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from quick_parts.comparison import Comparison, Pair, summarize
from quick_parts.figures import Figure, all_figures
from rich.console import Console

from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.report import rich_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "quick.json"
SESSIONS = 3
SHORTEST_SAMPLE = 0.02  # seconds: a call that takes less is repeated within a sample
FEWEST_PAIRS, MOST_PAIRS = 3, 16  # in one session
PAUSE = 0.003  # seconds, in which threads of the other process that wait for work go to sleep


class MeasurementError(Exception):
    """A worker could not measure a figure; the message says why."""


# -- two versions -----------------------------------------------------------------------------------------------------
@contextmanager
def checkout(source: str, repository: Path = HERE.parent) -> Iterator[Path]:
    """A folder that holds the package: the one named, or a temporary one with a revision's files.

    Raises: typer.BadParameter if `source` is neither.
    """
    if (Path(source) / "hf_linattn" / "__init__.py").is_file():
        yield Path(source).resolve()
        return
    git = ["git", "-C", str(repository), "archive", "--format=tar", source, "hf_linattn"]
    archive = subprocess.run(git, capture_output=True)
    if archive.returncode:
        message = archive.stderr.decode(errors="replace").strip()
        raise typer.BadParameter(f"{source!r} is neither a checkout's root nor a revision of this one: {message}")
    with tempfile.TemporaryDirectory() as target:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(target, filter="data")
        yield Path(target).resolve()


def revision(source: str) -> str:
    """What a result says about a version: its commit, marked if the folder's files may differ from it."""
    folder, name = (source, "HEAD") if Path(source).is_dir() else (str(HERE), source)
    git = ["git", "-C", folder, "describe", "--always", *(["--dirty"] if folder == source else [name])]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


class Worker:
    """A process with the package of one checkout. Raises `MeasurementError` if it has another package."""

    def __init__(self, package: Path, folder: str) -> None:
        quiet = {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        paths = os.pathsep.join([str(package), str(HERE)])
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quick_parts.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=folder,
            env={**os.environ, **quiet, "PYTHONPATH": paths},
            text=True,
        )
        found = Path(self._answer()["package"])
        if found != package / "hf_linattn":
            raise MeasurementError(f"{package} was to be measured, but Python imports {found}.")

    def ask(self, **request: Any) -> float:
        """Seconds. Raises `MeasurementError` with what the worker says."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self._answer()
        if "error" in answer:
            raise MeasurementError(answer["error"])
        return float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.log.seek(0)
        last = " ".join(self.log.read().decode(errors="replace").splitlines()[-3:])
        raise MeasurementError(f"A worker ended with status {self.process.wait()}: {last}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# -- turns ------------------------------------------------------------------------------------------------------------
def take_turns(name: str, sides: dict[str, Any], seconds: float, *, swap: bool = False) -> list[Pair]:
    """Pairs of samples of one figure, at least three; who goes first alternates.

    Args:
        sides: "before" and "after", each with a method `ask`. The error of one carries its name.
        seconds: Time for both, roughly.
        swap: Let "after" begin.
    """
    once = []
    for side, worker in sides.items():
        try:
            once.append(worker.ask(figure=name))
        except MeasurementError as error:
            raise MeasurementError(side, str(error)) from error
    calls = max(1, math.ceil(SHORTEST_SAMPLE / max(min(once), 1e-7)))
    pairs = []
    for index in range(max(FEWEST_PAIRS, min(MOST_PAIRS, int(seconds / (calls * sum(once)))))):
        taken = {}
        for side in sorted(sides, reverse=(index % 2 == 1) == swap):
            time.sleep(PAUSE)
            taken[side] = sides[side].ask(figure=name, calls=calls)
        pairs.append((taken["before"], taken["after"]))
    return pairs


def run_session(
    number: int, rows: Sequence[Comparison], sides: dict[str, Any], seconds: float, end: float = math.inf
) -> None:
    """Add one session to the rows, until the monotonic clock is past `end`. A failure is noted in its row."""
    for row in rows:
        if time.monotonic() > end:
            return
        try:
            row.sessions[number] = take_turns(row.name, sides, seconds, swap=number % 2 == 1)
        except MeasurementError as error:
            row.reason[error.args[0]] = error.args[-1]


def compare(figures: Sequence[Figure], checkouts: Sequence[Path], seconds: float, minutes: float) -> list[Comparison]:
    """All sessions, until nothing is in doubt or the time is over."""
    rows = [Comparison(figure.name) for figure in figures]
    end, number, chosen = time.monotonic() + 60 * minutes, 0, rows
    while chosen and time.monotonic() <= end:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            sides = {}
            for side, package in zip(("before", "after"), checkouts, strict=True):
                sides[side] = Worker(package, folder)
                stack.callback(sides[side].close)
            run_session(number, chosen, sides, seconds, end)
        number += 1
        print(f"session {number}: {len(chosen)} figures, {(end - time.monotonic()) / 60:.1f} minutes left", flush=True)
        chosen = [row for row in rows if not row.reason and (number < SESSIONS or row.is_doubtful)]
    return rows


# -- the script -------------------------------------------------------------------------------------------------------
def lines(rows: Sequence[Comparison]) -> Iterator[list[str]]:
    """The table's, slowest first."""
    for row in sorted(rows, key=lambda row: row.ratio if row.sessions else math.inf, reverse=True):
        numbers = [f"{seconds * 1e3:.2f} ms" for seconds in row.fastest] if row.sessions else ["", ""]
        ratios = [f"{row.ratio:.3f}", " ".join(f"{ratio:.2f}" for ratio in row.ratios)] if row.sessions else ["", ""]
        yield [row.name, *numbers, *ratios, " ".join([row.verdict, *row.reason.values()])]


def main(
    before: Annotated[str, typer.Option(help="A checkout's root, or a revision of this repository.")],
    after: Annotated[str, typer.Option(help="As --before; this checkout by default.")] = str(HERE.parent),
    self_check: Annotated[bool, typer.Option(help="Compare --before with itself.")] = False,
    only: Annotated[str, typer.Option(help="Only figures whose name contains this, e.g. '1 thread'.")] = "",
    minutes: Annotated[float, typer.Option(help="Nothing new is begun after this time.")] = 13.0,
    seconds: Annotated[float, typer.Option(help="Time for a figure in a session, both versions together.")] = 0.8,
    out: Annotated[Path | None, typer.Option(help="JSON file; if everything was run, the committed one.")] = None,
) -> None:
    """Compare two versions; the exit status says whether the later one is slower."""
    figures = [figure for figure in all_figures() if only in figure.name]
    if not figures:
        raise typer.BadParameter(f"No figure has {only!r} in its name: {[f.name for f in all_figures()]}")
    after = before if self_check else after
    with ExitStack() as stack:
        rows = compare(
            figures, [stack.enter_context(checkout(source)) for source in (before, after)], seconds, minutes
        )
    status, verdict = summarize(rows)
    header = ("figure", "before", "after", "ratio", "in each session", "verdict")
    Console(width=None if sys.stdout.isatty() else 150).print(rich_table("after / before", header, lines(rows)))
    print(verdict)
    target = out or (None if only or self_check else RESULTS)
    if target is not None:
        names = {"before": revision(before), "after": revision(after), "status": status}
        write_experiment(target, {**names, "rows": [row.to_dict() for row in rows]})
    sys.exit(status)


if __name__ == "__main__":
    typer.run(main)
