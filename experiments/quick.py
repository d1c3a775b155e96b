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

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from quick_parts.checkouts import ROOT, checkout, revision
from quick_parts.comparison import FIGURE_LIMIT, MEAN_LIMIT, Comparison, Summary, summarize
from quick_parts.figures import Figure, all_figures
from quick_parts.turns import run_session, workers
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results" / "quick.json"
SESSIONS = 3
console = Console(width=None if sys.stdout.isatty() else 150)


def compare(figures: Sequence[Figure], checkouts: Sequence[Path], seconds: float, minutes: float) -> list[Comparison]:
    """All sessions, until nothing is in doubt or the time is over."""
    rows = {figure.name: Comparison(figure.name, figure.group) for figure in figures}
    end = time.monotonic() + 60 * minutes
    session, chosen = 0, list(figures)
    while chosen:
        start = time.monotonic()
        with workers(checkouts) as both:
            run_session(session, chosen, rows, both, seconds, end)
        took, session = time.monotonic() - start, session + 1
        console.print(f"session {session}: {len(chosen)} figures, {took:.0f} s", highlight=False)
        if time.monotonic() > end:
            break
        failed = [name for name, row in rows.items() if row.reason]
        chosen = [
            figure
            for figure in figures
            if figure.name not in failed and (session < SESSIONS or rows[figure.name].is_doubtful)
        ]
    return list(rows.values())


def show(rows: Sequence[Comparison], found: Summary) -> Table:
    """Slowest first."""
    table = Table(title=f"after / before: geometric mean {found.mean:.3f}, worst {found.worst.ratio:.3f}")
    for column in ("figure", "before", "after", "ratio", "95 %", "pairs", "verdict"):
        table.add_column(column, justify="left" if column in ("figure", "verdict") else "right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row.ratio if row.sessions else float("inf"), reverse=True):
        values = row.to_dict()
        if not row.sessions:
            reasons = "; ".join(f"{side}: {reason}" for side, reason in row.reason.items()) or "time"
            table.add_row(row.name, "", "", "", "", "", f"not measured ({reasons})")
            continue
        low, high = row.interval
        times = [f"{values[f'{side}_seconds'] * 1e3:.2f} ms" for side in ("before", "after")]
        table.add_row(
            row.name, *times, f"{row.ratio:.3f}", f"{low:.2f} .. {high:.2f}", str(len(row.pairs)), row.verdict
        )
    return table


def explain(found: Summary) -> str:
    """The verdict in words."""
    parts = [f"geometric mean {found.mean:.3f} (at most {MEAN_LIMIT})"]
    parts.append(f"worst figure {found.worst.ratio:.3f} (at most {FIGURE_LIMIT}): {found.worst.name}")
    for names, what in (
        (found.slower, "slower than allowed"),
        (found.lost, "failing in the later version"),
        (found.unsettled, "slower than allowed, but perhaps by noise"),
        (found.missing, "not reached before the time was over"),
    ):
        if names:
            parts.append(f"{what}: {'; '.join(names)}")
    return "\n".join(parts)


def content(rows: Sequence[Comparison], found: Summary, names: dict[str, str]) -> dict[str, Any]:
    """What is written: no path of this machine."""
    from hf_linattn.bench.environment import describe

    about = describe()
    about["hardware"].pop("threads")  # a figure says how many it uses
    return {
        "schema": 1,
        **names,
        **about,
        "geometric_mean": round(found.mean, 4),
        "worst": round(found.worst.ratio, 4),
        "status": found.status,
        "rows": [row.to_dict() for row in rows],
    }


def main(
    before: Annotated[str, typer.Option(help="A checkout's root, or a revision of this repository.")],
    after: Annotated[str, typer.Option(help="As --before; this checkout by default.")] = str(ROOT),
    self_check: Annotated[bool, typer.Option(help="Compare --before with itself.")] = False,
    only: Annotated[
        str, typer.Option(help="Only figures whose name contains this, e.g. 'causal' or '1 thread'.")
    ] = "",
    minutes: Annotated[float, typer.Option(help="Nothing new is begun after this time.")] = 13.0,
    seconds: Annotated[float, typer.Option(help="Time for a figure in a session, both versions together.")] = 0.8,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; the committed one by default, if everything was run.")
    ] = None,
) -> None:
    """Compare two versions; the exit status says whether the later one is slower."""
    figures = [figure for figure in all_figures() if only in figure.name]
    if not figures:
        raise typer.BadParameter(f"No figure has {only!r} in its name: {[f.name for f in all_figures()]}")
    after = before if self_check else after
    with ExitStack() as stack:
        try:
            checkouts = [stack.enter_context(checkout(source)) for source in (before, after)]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        rows = compare(figures, checkouts, seconds, minutes)
    found = summarize(rows)
    console.print(show(rows, found))
    console.print(explain(found), soft_wrap=True, highlight=False)
    target = out or (None if only or self_check else RESULTS)
    if target is not None:
        names = {"before": revision(before), "after": revision(after)}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content(rows, found, names), indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {target}")
    sys.exit(found.status)


if __name__ == "__main__":
    typer.run(main)
