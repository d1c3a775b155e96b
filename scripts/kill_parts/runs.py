"""One run of the recipe in a fork of this process, which has everything imported: whole, or killed at a moment."""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import datasets
from transformers import TrainerCallback

import text_classification
from parts.common import run as run_program

Snapshot = frozenset[tuple[str, int]]


@dataclass(frozen=True)
class Moment:
    """When a run is killed.

    By itself, at a state of its files while it saves (`state` counts them from 1, over the whole run); or from
    outside, `delay` seconds after an event (`start`, `step N`, `evaluation N`).
    """

    state: int | None = None
    event: str | None = None
    delay: float = 0.0

    def __str__(self) -> str:
        return f"save, state {self.state}" if self.event is None else f"{self.event} + {1000 * self.delay:.0f} ms"


@dataclass
class Ended:
    """What is known of a run that has ended."""

    was_killed: bool
    status: int
    log: str
    # (seconds since the start, event), the last of which tells where a killed run was
    events: list[tuple[float, str]] = field(default_factory=list)

    def matching(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.log)


def snapshot(folder: Path) -> Snapshot:
    """Names and lengths of all files below a folder."""
    found: list[tuple[str, int]] = []
    places = [str(folder)]
    while places:
        try:
            with os.scandir(places.pop()) as entries:
                for entry in entries:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    found.append((entry.path, -1 if is_folder else entry.stat(follow_symlinks=False).st_size))
                    places += [entry.path] if is_folder else []
        except FileNotFoundError:
            continue
    return frozenset(found)


class Watch(TrainerCallback):
    """Reports where a run is, counts the states of its files while it saves, and ends it in one of them.

    States are looked for after every call that may have changed a file, by the profiler of Python.
    """

    def __init__(self, report: int, output: Path, watches: bool, kill_at: int | None) -> None:
        self.pipe, self.begun = report, time.perf_counter()
        self.output, self.watches, self.kill_at = output, watches, kill_at
        self.states, self.evaluations = 0, 0
        self.last: Snapshot = frozenset()
        self.is_trained = self.is_evaluating = False

    def tell(self, event: str) -> None:
        os.write(self.pipe, f"{time.perf_counter() - self.begun:.4f} {event}\n".encode())

    def watch(self) -> None:
        if not self.watches:
            return
        self.last = snapshot(self.output)
        sys.setprofile(self._look)

    def _look(self, frame: Any, event: str, argument: Any) -> None:
        if event != "c_return":
            return
        now = snapshot(self.output)
        if now != self.last:
            self.last = now
            self.changed()

    def changed(self) -> None:
        self.states += 1
        self.tell(f"state {self.states}")
        if self.states == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell("training")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(f"step {state.global_step + 1}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self.watch()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sys.setprofile(None)
        self.tell(f"saved {state.global_step}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_evaluating:
            self.is_evaluating = True
            self.evaluations += 1
            self.tell(f"evaluation {self.evaluations}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_evaluating = False
        self.tell(f"evaluated {self.evaluations}")
        if self.is_trained:  # what follows is the last save
            self.watch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_trained = True
        if not args.do_eval:  # no evaluation stands between this and the last save
            self.watch()


def run(
    argv: Sequence[str], folder: Path, output: Path, moment: Moment | None = None, counts_states: bool = False
) -> Ended:
    """Run the recipe with these arguments; `folder` gets its log and its cache of data sets."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"log-{len(list(folder.glob('log-*')))}.txt"
    reader, writer = os.pipe()
    kill_at = moment.state if moment else None
    child = os.fork()
    if child == 0:
        os.close(reader)
        run_here(
            text_classification.main,
            argv,
            folder,
            log,
            Watch(writer, output, counts_states or kill_at is not None, kill_at),
        )
    os.close(writer)
    text = b""
    waits_for = moment.event if moment else None
    while True:
        # All of what comes until the end of the pipe, which is that of the child.
        if waits_for is not None and (waits_for == "start" or f" {waits_for}\n".encode() in text):
            select.select([], [], [], moment.delay if moment else 0.0)
            os.kill(child, signal.SIGKILL)
            waits_for = None
        if not (more := os.read(reader, 65536)):
            break
        text += more
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    events = [(float(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in text.decode().splitlines()]
    return Ended(status == -signal.SIGKILL, status, log.read_text(encoding="utf-8"), events)


def run_here(
    main: Callable[..., Any], argv: Sequence[str], folder: Path, log: Path, watch: TrainerCallback
) -> NoReturn:
    """Run a recipe in the child that this is, as its program does; never returns."""
    status: Any = 1
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        logging.root.handlers.clear()  # the recipe starts logging anew
        datasets.config.HF_DATASETS_CACHE = folder / "datasets"
        run_program(lambda: main(list(argv), [watch]))
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
