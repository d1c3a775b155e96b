"""Write the table of docs/papers.md from experiments/results/papers.

python experiments/papers/papers_table.py            # from the results there are
python experiments/papers/papers_table.py --run      # first runs those that need no training: ten minutes of one core
python experiments/papers/papers_table.py --check    # writes nothing: is the page what the results say?
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import paper_tools
import typer
from rich.progress import track

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS, RESULTS = Path("experiments/papers"), Path("experiments/results/papers")  # in the checkout
PAGE = ROOT / "docs" / "papers.md"
CLAIMS, SCORES = "papers", "trained"  # names of the parts of the page that are written here
EXPERIMENTS = (
    "favor_plus_error",
    "attention_kernels",
    "favor_sharp_variance",
    "kernel_classification",
    "randomized_bias",
    "control_variates",
)
METRICS = ("accuracy", "nll")
TRAINED = ("small_vit", "small_glue", "small_plays")  # by trained_models.py, hours altogether


def line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(results: Path) -> str:
    """A line per claim of all experiments."""
    lines = [line("where", "claim", "here", "agrees", "script"), "|---|---|---|---|---|"]
    for name in (*EXPERIMENTS, *TRAINED):
        stored = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        link = f"[{name}](../{RESULTS.as_posix()}/{name}.json)"
        lines += [
            line(claim["source"], claim["claim"], claim["figure"], f"**{claim['agrees']}**", link)
            for claim in stored["claims"]
        ]
    return "\n".join(lines)


def scores(results: Path) -> str:
    """What the trained models reach, a line for each run."""
    lines = [line("experiment", "attention", "seed", "score", "better than softmax by"), "|---|---|---:|---|---|"]
    for name in TRAINED:
        stored = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for row in stored["rows"]:
            gap = row.get("better than softmax by") if row["attention"] != "softmax" else None
            shown = str(paper_tools.Estimate(**gap)) if gap else ""
            found = ", ".join(f"{metric} {row[metric]:.4g}" for metric in METRICS if metric in row)
            link = f"[{name}](../{RESULTS.as_posix()}/{name}.json)"
            lines.append(line(link, row["attention"], str(row["seed"]), found, shown))
    return "\n".join(lines)


def inserted(page: str, part: str, lines: str) -> str:
    """The page with other lines between the marks of a part."""
    first, last = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        paper_tools.fail(f"{PAGE.name} needs the lines {first} and {last}")
    return f"{before}{first}\n\n{lines}\n\n{last}{after}"


def main(
    run: Annotated[bool, typer.Option("--run", help="First run those that need no training.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page is not up to date.")] = False,
) -> None:
    """Write docs/papers.md anew."""
    if run:
        for name in track(EXPERIMENTS, description="Running"):
            command = [f"{SCRIPTS.as_posix()}/{name}.py", "--out", f"{RESULTS.as_posix()}/{name}.json"]
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    if missing := [name for name in (*EXPERIMENTS, *TRAINED) if not (ROOT / RESULTS / f"{name}.json").exists()]:
        paper_tools.fail(f"{RESULTS} has no results of {missing}. Use --run or trained_models.py.")
    page = PAGE.read_text(encoding="utf-8")
    made = inserted(inserted(page, CLAIMS, table(ROOT / RESULTS)), SCORES, scores(ROOT / RESULTS))
    if check and made != page:
        paper_tools.fail(f"docs/{PAGE.name} is not what the results say: run {Path(__file__).name}")
    if not check:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
