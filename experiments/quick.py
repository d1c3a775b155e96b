"""Is one version of the library slower than another? `hf-linattn bench` with either, in turns.

    python experiments/quick.py --before v0.1.0                     # this checkout against a revision
    python experiments/quick.py --before ../old --after ../new      # or two folders
    python experiments/quick.py --before HEAD --self-check          # a version against itself: what noise does
    python experiments/quick.py --before HEAD "attention --kinds eva --lengths 4096 --seconds 1"

A figure is the time of a kind over that of softmax beside it, in the same process and in turns, which is what a busy
machine leaves alone. Sessions, each with new processes, are repeated while a figure is in doubt, until the time is
over. Exit status: 0 if the geometric mean of after / before is at most 1.03 and no figure's median is above 1.10; 1 if
the mean is above, or a figure in every session (one that fails now is infinitely slow); 2 if a figure above 1.10 may
be noise (run it again, on a quieter machine).
"""

from __future__ import annotations

import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import shared
import typer

from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.results import Results

RUNS = (
    "attention --lengths 256,1024,4096 --peers sdpa --seconds 0.1",
    # The sizes are those that every version had by default, to compare the same with the same.
    "models --lengths 256 --layers 1 --models minilm,gpt2,vit --batch 1 --num-features 256 --seconds 0.2",
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
    git = ["git", "-C", str(repository), "archive", "--format=zip", source, "hf_linattn"]
    archive = subprocess.run(git, stdout=subprocess.PIPE)  # says on stderr what is wrong
    if archive.returncode:
        raise typer.BadParameter(f"{source!r} is neither a checkout's root nor a revision of this one.")
    with tempfile.TemporaryDirectory() as target:
        zipfile.ZipFile(io.BytesIO(archive.stdout)).extractall(target)
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


def verdict(ratios: Sequence[float]) -> str:
    """Of one figure: "slower" than allowed in every session, "unsettled" if only in most of them, else "fine"."""
    if statistics.median(ratios) <= FIGURE_LIMIT:
        return "fine"
    return "slower" if min(ratios) > FIGURE_LIMIT else "unsettled"


def compare(checkouts: Sequence[Path], runs: Sequence[str], minutes: float) -> dict[str, list[float]]:
    """After / before of every figure, session by session; infinite where only the earlier version can be measured.

    Sessions, each of both versions, end when nothing is in doubt or the time does not suffice for another one.
    """
    found: dict[str, list[float]] = {}
    start, number = time.monotonic(), 0
    while number < SESSIONS or any(verdict(ratios) == "unsettled" for ratios in found.values()):
        took = (time.monotonic() - start) / 60
        if number and took * (number + 1) / number > minutes:
            break
        turn = -1 if number % 2 else 1
        before, after = [measure(package, runs) for package in checkouts[::turn]][::turn]
        for name in before.keys() & after.keys():
            if before[name] is not None:
                found.setdefault(name, []).append((after[name] or math.inf) / before[name])
        number += 1
        print(f"session {number} is over, after {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    return found


def summarize(found: dict[str, list[float]]) -> tuple[int, str]:
    """The exit status (0 not worse, 1 worse, 2 no verdict about some figure), and the verdict in words.

    Raises: ValueError if nothing was measured.
    """
    if not found:
        raise ValueError("No figure could be measured with both versions.")
    ratios = {name: statistics.median(sessions) for name, sessions in found.items()}
    mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
    worst = max(ratios, key=ratios.__getitem__)
    lines = [f"geometric mean of {len(ratios)} figures {mean:.3f} (at most {MEAN_LIMIT})"]
    lines.append(f"worst figure {ratios[worst]:.3f} (at most {FIGURE_LIMIT}): {worst}")
    slower, unsettled = ([n for n in found if verdict(found[n]) == what] for what in ("slower", "unsettled"))
    lines += [f"{what}: {'; '.join(names)}" for what, names in (("slower", slower), ("unsettled", unsettled)) if names]
    return 1 if mean > MEAN_LIMIT or slower else 2 if unsettled else 0, "\n".join(lines)


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
        found = compare([stack.enter_context(checkout(source)) for source in sources], runs or RUNS, minutes)
    status, words = summarize(found)
    lines = [
        {"figure": name, "after / before": [round(ratio, 2) for ratio in ratios], "verdict": verdict(ratios)}
        for name, ratios in sorted(found.items(), key=lambda entry: max(entry[1]), reverse=True)
    ]
    shared.print_table("Time over that of softmax", lines)
    print(words)
    if out is not None:
        write_experiment(out, {"before": sources[0], "after": sources[1], "status": status, "rows": lines})
    sys.exit(status)


if __name__ == "__main__":
    typer.run(main)
