"""Is short input fast? Time over that of softmax, or of another implementation, with the most that it may be.

    python experiments/short_inputs.py                                  # everything, an hour on one quiet core
    python experiments/short_inputs.py --parts attention,exact          # minutes; `PARTS` has their names
    python experiments/short_inputs.py --parts models --layers 1 --lengths 128,256 --kinds eva
    python experiments/short_inputs.py --resume                         # goes on where a run was cut short

Whatever is compared runs in turns in one process on one thread; times are medians of processor time, which other
programs do not lengthen. The reference is `sdpa`, the
function of Transformers, called through the same interface. The results are written after every case. Cases that are
not measured keep what the file has of them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import typer
from short_cases import PARTS, Case, Run
from torch.utils.benchmark import Measurement, Timer

import hf_linattn
from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.plan import race
from hf_linattn.bench.results import Row
from hf_linattn.bench.timing import time_calls

OUT = Path(__file__).parent / "results" / "short_inputs.json"


def once(call: Callable[[], object], seconds: float) -> Measurement:
    """One call: what takes long needs no second one to be timed by."""
    return Timer("call()", globals={"call": call}, timer=time.process_time, num_threads=1).timeit(1)


def lines_of(case: Case, run: Run) -> list[dict[str, Any]]:
    """Every bound of a case: the ratio that was measured, and whether it was kept. `None` where nothing was."""
    entries = case.entries()
    rows = [(Row(case.part, entry.name, "", case.work), entry.make) for entry in entries]
    # One that takes longer than its seconds is timed in two rounds, too few outside of a quick run.
    timed = (
        race(rows, 0.0 if run.is_quick else math.inf, once)
        if case.is_long
        else race(rows, run.seconds, partial(time_calls, clock=time.process_time))
    )
    found = {row.name: row for row in timed}
    lines = []
    for entry in entries:
        if entry.bound is None:
            continue
        ours, theirs = found[entry.name], found[entry.over]
        ratio = ours.median / theirs.median if ours.median and theirs.median else None
        line = {"part": case.part, "case": case.title, "what": entry.name, "over": entry.over}
        line |= {"bound": round(entry.bound, 3), "ratio": ratio and round(ratio, 3)}
        line |= {"held": None if ratio is None else ratio <= entry.bound}
        if ours.median and theirs.median:
            line |= {"ms": round(ours.median * 1e3, 3), "reference ms": round(theirs.median * 1e3, 3)}
        lines.append(line | ({"reason": ours.reason or theirs.reason} if ratio is None else {}))
    return lines


def key_of(line: dict[str, Any]) -> tuple[str, ...]:
    return line["part"], line["case"], line["what"]


def verdict(line: dict[str, Any]) -> str:
    return {True: "held", False: "MISSED", None: line.get("reason", "")[:40]}[line["held"]]


def show(lines: Sequence[dict[str, Any]]) -> None:
    """A table a part, and how many bounds are kept."""
    columns = ("case", "what", "over", "bound", "ratio", "ms")
    for part in dict.fromkeys(line["part"] for line in lines):
        own = [line for line in lines if line["part"] == part]
        rows = [{**{name: line.get(name) for name in columns}, "": verdict(line)} for line in own]
        held, measured = sum(line["held"] is True for line in own), sum(line["held"] is not None for line in own)
        shared.print_table(f"{part}: {held} of {measured} kept", rows)


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def main(
    parts: Annotated[str, typer.Option(help="Of the measurement, separated by commas.")] = ",".join(PARTS),
    kinds: Annotated[str, typer.Option(help="Of attention.")] = ",".join(hf_linattn.list_kinds()),
    lengths: Annotated[str, typer.Option(help="Only these numbers of tokens.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Rows of MiniLM: 8 to 16.")] = 8,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers of the whole models.")] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="For each attention function in each case.")] = 1.0,
    quick: Annotated[bool, typer.Option("--quick", help="A minute: the two shortest lengths, one layer.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out cases that the file has.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON file [default: results/short_inputs.json, none if quick].")
    ] = None,
) -> None:
    """Measure, print the bounds and write the file."""
    chosen = names(parts)
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"parts must be of {list(PARTS)}; got {sorted(unknown)}.")
    if unknown := set(names(kinds)) - set(hf_linattn.list_kinds()):
        raise typer.BadParameter(f"kinds must be of {hf_linattn.list_kinds()}; got {sorted(unknown)}.")
    torch.set_num_threads(1)
    shared.quiet()
    run = Run(names(kinds), tuple(map(int, names(lengths))), 0.05 if quick else seconds, batch, layers, quick)
    path = out or (None if quick else OUT)
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    if path is not None and path.exists():
        kept = {key_of(line): line for line in json.loads(path.read_text(encoding="utf-8"))["lines"]}
    had, took, measured = {key[:2] for key in kept}, dict.fromkeys(chosen, 0.0), []
    for part in chosen:
        for case in PARTS[part](run):
            if resume and (case.part, case.title) in had:
                continue
            start = time.perf_counter()
            lines = lines_of(case, run)
            took[part] += time.perf_counter() - start
            measured += lines
            kept |= {key_of(line): line for line in lines}
            typer.echo(f"{part}: {case.title}, {time.perf_counter() - start:.0f} s", err=True)
            if path is not None:
                write_experiment(path, {"lines": list(kept.values())})
    show(measured)
    typer.echo("seconds: " + ", ".join(f"{part} {spent:.0f}" for part, spent in took.items()))


if __name__ == "__main__":
    typer.run(main)
