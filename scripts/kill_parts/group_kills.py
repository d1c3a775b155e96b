"""Kills of runs on two processes: of one or of both, from outside and within saves, with several recipes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from .groups import DYING, GRACE, GroupEnded, Kill, run_group
from .recipes import command_line
from .weights import difference

WHO = ((0,), (1,), (0, 1))  # in turn


def group_moments(whole: GroupEnded, kills: int, draw: random.Random) -> list[Kill]:
    """Half of them in saves, the others outside: at the start, in steps and in evaluations."""
    states = [_states(events) for events in whole.events]
    saves = len(states[0])
    found = []
    done = [0, 0]
    for i in range(kills // 2):
        ranks = WHO[i % 3]
        # From the last save backwards. The model at the end is saved by the first process alone.
        last = saves - ranks[0]
        save = last - done[ranks[0]] % last
        done[ranks[0]] += 1
        found.append(Kill(ranks, save=save, state=draw.randint(1, max(states[ranks[0]].get(save, 1), 1))))
    times = {event: seconds for seconds, event in reversed(whole.events[0])}  # of the first of that name
    steps = sum(event.startswith("step ") for event in times)
    evaluations = sum(event.startswith("evaluation ") for event in times)
    for i in range(kills - kills // 2):
        ranks = WHO[i % 3]
        place = ("step", "start", "evaluation" if evaluations else "step")[i % 3]
        if place == "start":
            found.append(Kill(ranks, event="start", delay=draw.random() * times["training"]))
        elif place == "step":
            found.append(Kill(ranks, event=f"step {draw.randint(1, steps)}", delay=0.1 * draw.random()))
        else:
            found.append(Kill(ranks, event=f"evaluation {draw.randint(1, evaluations)}", delay=0.1 * draw.random()))
    return found


def _states(events: list[tuple[float, str]]) -> dict[int, int]:
    """How many states of its files a process saw in each save, those of attention transfer before it left out."""
    found: dict[int, int] = {}
    for _, event in events:
        word, *numbers = event.split()
        if word == "save":
            found[int(numbers[0])] = 0
        elif word == "state":
            found[int(numbers[0])] = int(numbers[1])
    return found


def check_group_kill(
    folder: Path, place: Path, recipe: str, kill: Kill, whole: Path, processes: int
) -> dict[str, Any]:
    """Kill one run, start it again, and compare."""
    output = place / "output"
    argv = command_line(recipe, folder, output)
    killed = run_group(recipe, argv, place, output, kill, processes)
    again = run_group(recipe, argv, place, output, processes=processes)
    others = [rank for rank in range(processes) if rank not in kill.ranks]
    told = [event for _, event in killed.events[kill.ranks[0]]]
    wrong = ""
    if any(killed.statuses[rank] != -9 for rank in kill.ranks):
        wrong = f"ended with {killed.statuses} before it was killed"
    elif any((killed.seconds_after[rank] or 0) >= GRACE for rank in others):
        wrong = "the process that was left waited for the killed one"
    elif any(again.statuses):
        wrong = f"the same command ended with {again.statuses}: {again.log.strip().splitlines()[-1]}"
    else:
        wrong = difference(output / "model.safetensors", whole)
    skipped = again.matching(r"Skipping \S*/(checkpoint-\d+), which is (.*)\. It is")
    resumed = again.matching(
        r"(?:Resuming|goes on) from (?:\S*/(?=transfer))?(?:\S*/(?=checkpoint))?(\S*checkpoint-\d+)"
    )
    return {
        "recipe": recipe,
        "moment": str(kill),
        "killed": list(kill.ranks),
        "in_save": kill.event is None,
        "last_event": next((event for event in reversed(told) if event != DYING), "start"),
        "left": {rank: [killed.statuses[rank], killed.seconds_after[rank]] for rank in others},
        "resumed_from": resumed[-1] if resumed else "the beginning",
        "skipped": [" ".join(pair) for pair in skipped],
        "wrong": wrong,
    }


def check_groups(
    folder: Path, recipes: list[str], kills: int, seed: int, processes: int, tell: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The kills of all recipes, and how many states each process saw in its saves."""
    found: list[dict[str, Any]] = []
    states: dict[str, Any] = {}
    for recipe in recipes:
        draw = random.Random(f"{seed} {recipe}")
        place = folder / recipe / "undisturbed"
        argv = command_line(recipe, folder, place / "output")
        whole = run_group(recipe, argv, place, place / "output", processes=processes, counts_states=True)
        if any(whole.statuses):
            raise SystemExit(f"The undisturbed run of {recipe} failed:\n" + "\n".join(whole.logs))
        states[recipe] = [sum(_states(events).values()) for events in whole.events]
        for i, kill in enumerate(group_moments(whole, kills, draw)):
            weights = place / "output" / "model.safetensors"
            found.append(check_group_kill(folder, folder / recipe / str(i), recipe, kill, weights, processes))
            tell(found[-1])
    return found, states
