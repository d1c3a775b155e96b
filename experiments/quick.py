"""Is one version of the library slower than another? `hf-linattn bench` with either, in turns.

    python experiments/quick.py --before v0.1.0                     # this checkout against a revision
    python experiments/quick.py --before ../old --after ../new      # or two folders
    python experiments/quick.py --before HEAD --self-check          # a version against itself: what noise does
    python experiments/quick.py --before HEAD "attention --kinds eva --lengths 4096 --seconds 1"

A figure is the time of a kind over that of softmax beside it, in the same process and in turns, which is what a busy
machine leaves alone. Sessions, each with new processes, are repeated while a figure is in doubt, until the time is
over. Exit status: 0 if the geometric mean of after / before is at most 1.03 and no figure's median is above 1.10; 1 if
the mean is, or a figure in every session, or one fails now; 2 if a figure above 1.10 may be noise (run it again, on a
quieter machine).
"""

from __future__ import annotations

import io
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import shared
import typer

from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.results import Results

RUNS = (
    "attention --lengths 256,1024,4096 --peers sdpa --seconds 0.1",
    "models --lengths 256 --layers 1 --models minilm,gpt2,vit --seconds 0.2",
    "generation --lengths 1024 --layers 2 --seconds 0.4",
)
MEAN_LIMIT, FIGURE_LIMIT = 1.03, 1.10
SESSIONS = 3


@contextmanager
def checkout(source: str, repository: Path = shared.ROOT) -> Iterator[Path]:
    """A folder that holds the package: the one named, or a temporary one with a revision's files.

    Raises: typer.BadParameter if `source` is neither.
    """
    if (Path(source) / "hf_linattn" / "__init__.py").is_file():
        yield Path(source).resolve()
        return
    git = ["git", "-C", str(repository), "archive", "--format=tar", source, "hf_linattn"]
    archive = subprocess.run(git, stdout=subprocess.PIPE)  # says on stderr what is wrong
    if archive.returncode:
        raise typer.BadParameter(f"{source!r} is neither a checkout's root nor a revision of this one.")
    with tempfile.TemporaryDirectory() as target:
        tarfile.open(fileobj=io.BytesIO(archive.stdout)).extractall(target, filter="data")
        yield Path(target).resolve()


def measure(package: Path, runs: Sequence[str]) -> dict[str, float | None]:
    """Figures of the version in a folder; `None` for what could not be measured."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        for run in runs:
            command = [sys.executable, "-m", "hf_linattn.cli", "bench", *run.split(), "--json", str(path)]
            environment = {**os.environ, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"}
            subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
            for row in Results.read(path).rows:
                if row.group == "linear":
                    found[f"{row.panel}, {row.work.tokens}: {row.name}"] = 1 / row.ratio if row.ratio else None
    return found


@dataclass
class Comparison:
    """One figure: after / before, session by session."""

    name: str
    sessions: list[float] = field(default_factory=list)
    is_failing: bool = False

    @property
    def ratio(self) -> float:
        return statistics.median(self.sessions)

    @property
    def verdict(self) -> str:
        """What is "slower" than allowed is so in every session; what is so in most of them is "unsettled"."""
        if self.is_failing:
            return "failing after"
        if self.ratio <= FIGURE_LIMIT:
            return "fine"
        return "slower" if min(self.sessions) > FIGURE_LIMIT else "unsettled"


def compare(checkouts: Sequence[Path], runs: Sequence[str], minutes: float) -> list[Comparison]:
    """Sessions, each of both versions, until nothing is in doubt or the time does not suffice for another one."""
    rows: dict[str, Comparison] = {}
    start, number = time.monotonic(), 0
    while number < SESSIONS or any(row.verdict == "unsettled" for row in rows.values()):
        took = (time.monotonic() - start) / 60
        if number and took * (number + 1) / number > minutes:
            break
        sides = [measure(package, runs) for package in checkouts[:: -1 if number % 2 else 1]]
        before, after = sides[:: -1 if number % 2 else 1]
        for name in before.keys() & after.keys():
            row = rows.setdefault(name, Comparison(name))
            old, new = before[name], after[name]
            row.is_failing |= old is not None and new is None
            if old is not None and new is not None:
                row.sessions.append(new / old)
        number += 1
        print(f"session {number} is over, after {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    return [row for row in rows.values() if row.sessions or row.is_failing]


def summarize(rows: Sequence[Comparison]) -> tuple[int, str]:
    """The exit status (0 not worse, 1 worse, 2 no verdict about some figure), and the verdict in words.

    Raises: ValueError if nothing was measured.
    """
    measured = [row for row in rows if row.sessions]
    if not measured:
        raise ValueError("No figure could be measured with both versions.")
    mean = math.exp(statistics.fmean(math.log(row.ratio) for row in measured))
    worst = max(measured, key=lambda row: row.ratio)
    lines = [f"geometric mean of {len(measured)} figures {mean:.3f} (at most {MEAN_LIMIT})"]
    lines.append(f"worst figure {worst.ratio:.3f} (at most {FIGURE_LIMIT}): {worst.name}")
    named = {
        what: [row.name for row in rows if row.verdict == what] for what in ("slower", "failing after", "unsettled")
    }
    lines += [f"{what}: {'; '.join(names)}" for what, names in named.items() if names]
    is_worse = mean > MEAN_LIMIT or named["slower"] or named["failing after"]
    return 1 if is_worse else 2 if named["unsettled"] else 0, "\n".join(lines)


def main(
    before: Annotated[str, typer.Option(help="A checkout's root, or a revision of this repository.")],
    runs: Annotated[
        list[str] | None, typer.Argument(help="What to run instead: arguments of hf-linattn bench.")
    ] = None,
    after: Annotated[str, typer.Option(help="As --before; this checkout by default.")] = str(shared.ROOT),
    self_check: Annotated[bool, typer.Option(help="Compare --before with itself.")] = False,
    minutes: Annotated[float, typer.Option(help="No session is begun that would end later.")] = 15.0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare two versions; the exit status says whether the later one is slower."""
    sources = [before, before if self_check else after]
    with ExitStack() as stack:
        rows = compare([stack.enter_context(checkout(source)) for source in sources], runs or RUNS, minutes)
    status, verdict = summarize(rows)
    lines = [
        {"figure": row.name, "after / before": [round(ratio, 2) for ratio in row.sessions], "verdict": row.verdict}
        for row in sorted(rows, key=lambda row: max(row.sessions, default=0), reverse=True)
    ]
    shared.print_table("Time over that of softmax", lines)
    print(verdict)
    if out is not None:
        write_experiment(out, {"before": sources[0], "after": sources[1], "status": status, "rows": lines})
    sys.exit(status)


if __name__ == "__main__":
    typer.run(main)
