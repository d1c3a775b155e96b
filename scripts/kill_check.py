"""Kill runs of recipes and start them again: do they end with the same weights, bit by bit?

    python scripts/kill_check.py                              # forty kills, a few minutes on one core
    python scripts/kill_check.py --kinds eva --kills 2        # some of them
    python scripts/kill_check.py --processes 2                # twenty kills of two recipes, one process or both

One process is one of text classification, with every kind; two are of any recipes (`--recipes`).

Half of the kills of a kind fall into a save: the run ends itself in one of the states that its files pass through
while checkpoints are written, old ones deleted and the model is saved at the end. The others come from outside, while
the run starts, in both epochs and in both evaluations. Every run is a fork of this process, to save the imports; every
start of a run has the same command line.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]  # from a checkout, where nothing is installed
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # forks, no threads

import typer
from rich.console import Console
from rich.table import Table

from hf_linattn.bench.environment import describe
from isolated import write_atomically
from kill_parts.group_kills import check_groups
from kill_parts.inputs import ARGUMENTS, SETTINGS, STEPS_PER_EPOCH, build, command_line
from kill_parts.recipes import RECIPES, SHARED
from kill_parts.recipes import build as build_all
from kill_parts.runs import Ended, Moment, run
from kill_parts.weights import difference

TWO = ("text_classification", "language_modeling")
RESULTS = ROOT / "experiments" / "results" / "kill_check.json"


def moments(whole: Ended, kills: int, draw: random.Random) -> list[Moment]:
    """Half of them in saves, spread over their states; the others outside, one after the other of five places."""
    count = sum(event.startswith("state ") for _, event in whole.events)
    inside = kills // 2
    found = [Moment(state=1 + int(count * (i + draw.random()) / inside)) for i in range(inside)]
    times = {event: seconds for seconds, event in reversed(whole.events)}  # of the first of that name
    step = (times[f"step {STEPS_PER_EPOCH}"] - times["step 1"]) / (STEPS_PER_EPOCH - 1)
    for i in range(kills - inside):
        place = ("start", "step", "evaluation")[(0, 1, 2, 1, 2)[i % 5]]
        epoch = int(i % 5 > 2)
        if place == "start":
            found.append(Moment(event="start", delay=0.7 * draw.random() * times["training"]))  # faster once warm
        elif place == "step":
            number = 1 + epoch * STEPS_PER_EPOCH + draw.randrange(STEPS_PER_EPOCH)
            found.append(Moment(event=f"step {number}", delay=draw.random() * step))
        else:
            span = times[f"evaluated {epoch + 1}"] - times[f"evaluation {epoch + 1}"]
            found.append(Moment(event=f"evaluation {epoch + 1}", delay=draw.random() * span))
    return found


def where(killed: Ended) -> dict[str, Any]:
    """The epoch (0 before the first), the last step that was begun, and what was reported last."""
    steps = [int(event.split()[1]) for _, event in killed.events if event.startswith("step ")]
    step = steps[-1] if steps else 0
    return {
        "epoch": -(-step // STEPS_PER_EPOCH),
        "step": step,
        "last_event": killed.events[-1][1] if killed.events else "start",
    }


def check_kill(folder: Path, place: Path, kind: str, moment: Moment, whole: Path) -> dict[str, Any]:
    """Kill one run, start it again, and compare."""
    output = place / "output"
    argv = command_line(folder, output, kind)
    killed = run(argv, place, output, moment)
    again = run(argv, place, output)
    wrong = ""
    if not killed.was_killed:
        wrong = f"ended with status {killed.status} before it was killed"
    elif again.status:
        wrong = f"the same command ended with status {again.status}: {again.log.strip().splitlines()[-1]}"
    else:
        wrong = difference(output / "model.safetensors", whole)
    skipped = again.matching(r"Skipping \S*/(checkpoint-\d+), which is (.*)\. It is")
    resumed = again.matching(r"Resuming from \S*/(checkpoint-\d+)")
    return {
        "kind": kind,
        "moment": str(moment),
        "in_save": moment.event is None,
        **where(killed),
        "resumed_from": resumed[0] if resumed else "the beginning",
        "skipped": [" ".join(pair) for pair in skipped],
        "wrong": wrong,
    }


def main(
    processes: Annotated[int, typer.Option(help="Of a run.", min=1, max=4)] = 1,
    recipes: Annotated[str, typer.Option(help="With several processes; separated by commas.")] = ",".join(TWO),
    kinds: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(SETTINGS),
    kills: Annotated[int, typer.Option(help="Of each kind; half of them in saves.", min=2)] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON of the results.")] = None,
) -> None:
    """Kill recipe runs at chosen moments, start them again, and compare their weights with undisturbed ones."""
    out = out or (RESULTS if processes == 1 else RESULTS.with_name("kill_check_two_processes.json"))
    if processes > 1:
        _check_several(processes, [name.strip() for name in recipes.split(",")], kills, seed, out)
    chosen = [kind.strip() for kind in kinds.split(",")]
    for kind in chosen:
        if kind not in SETTINGS:
            raise typer.BadParameter(f"--kinds are {', '.join(SETTINGS)}; got {kind!r}.")
    console, begun = Console(), time.perf_counter()
    found: list[dict[str, Any]] = []
    states: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        for kind in chosen:
            draw = random.Random(f"{seed} {kind}")
            place = folder / kind / "undisturbed"
            whole = run(command_line(folder, place / "output", kind), place, place / "output", counts_states=True)
            if whole.status:
                raise SystemExit(f"The undisturbed run of {kind} failed:\n{whole.log}")
            states[kind] = sum(event.startswith("state ") for _, event in whole.events)
            for i, moment in enumerate(moments(whole, kills, draw)):
                weights = place / "output" / "model.safetensors"
                found.append(check_kill(folder, folder / kind / str(i), kind, moment, weights))
                console.print(_line(found[-1]), markup=False, highlight=False, soft_wrap=True)
    content = {
        **_header(out),
        "recipe": ARGUMENTS,
        "settings": {kind: SETTINGS[kind] for kind in chosen},
        "steps_per_epoch": STEPS_PER_EPOCH,
        "states_of_the_files_in_all_saves": states,
        "kills": found,
        "seconds": round(time.perf_counter() - begun),
    }
    write_atomically(out, json.dumps(content, indent=1) + "\n")
    console.print(_table(found))
    console.print(f"Results: {out}", soft_wrap=True)
    raise typer.Exit(1 if any(kill["wrong"] for kill in found) else 0)


def _check_several(processes: int, recipes: list[str], kills: int, seed: int, out: Path) -> NoReturn:
    """The same with runs of several processes."""
    for recipe in recipes:
        if recipe not in RECIPES:
            raise typer.BadParameter(f"--recipes are {', '.join(RECIPES)}; got {recipe!r}.")
        importlib.import_module(recipe)  # before the processes fork
    console, begun = Console(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        build_all(Path(name))

        def tell(kill: dict[str, Any]) -> None:
            left = "".join(
                f"; process {rank} ended with {status} after {after} s"
                for rank, (status, after) in kill["left"].items()
            )
            skipped = f" ({'; '.join(kill['skipped'])})" if kill["skipped"] else ""
            result = f"from {kill['resumed_from']}{skipped}: {kill['wrong'] or 'same weights'}"
            line = f"{kill['recipe']}, {kill['moment']} ({kill['last_event']}{left}): {result}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        found, states = check_groups(Path(name), recipes, kills, seed, processes, tell)
    content = {
        **_header(out),
        "recipes": {recipe: {**SHARED, **RECIPES[recipe]} for recipe in recipes},
        "states_of_the_files_in_all_saves_by_process": states,
        "kills": found,
        "seconds": round(time.perf_counter() - begun),
    }
    write_atomically(out, json.dumps(content, indent=1) + "\n")
    console.print(f"Results: {out}", soft_wrap=True)
    raise typer.Exit(1 if any(kill["wrong"] for kill in found) else 0)


def _header(out: Path) -> dict[str, Any]:
    given = [Path(argument).name if argument == str(out) else argument for argument in sys.argv[1:]]
    return {
        "command": " ".join(["python", "scripts/kill_check.py", *given]),
        "date": time.strftime("%Y-%m-%d"),
        "environment": describe(),
    }


def _line(kill: dict[str, Any]) -> str:
    skipped = f" ({'; '.join(kill['skipped'])})" if kill["skipped"] else ""
    result = kill["wrong"] or "same weights"
    place = f"step {kill['step']}, {kill['last_event']}"
    return f"{kill['kind']}, {kill['moment']} ({place}): from {kill['resumed_from']}{skipped}: {result}"


def _table(found: list[dict[str, Any]]) -> Table:
    columns: dict[str, Callable[[dict[str, Any]], bool]] = {
        "kills": lambda kill: True,
        "in a save": lambda kill: kill["in_save"],
        "before step 1": lambda kill: kill["epoch"] == 0,
        "in epoch 1": lambda kill: kill["epoch"] == 1,
        "in epoch 2": lambda kill: kill["epoch"] == 2,
        "damaged a checkpoint": lambda kill: bool(kill["skipped"]),
        "same weights": lambda kill: not kill["wrong"],
    }
    table = Table("kind", *columns)
    for kind in dict.fromkeys(kill["kind"] for kill in found):
        own = [kill for kill in found if kill["kind"] == kind]
        table.add_row(kind, *(str(sum(map(counts, own))) for counts in columns.values()))
    return table


if __name__ == "__main__":
    typer.run(main)
