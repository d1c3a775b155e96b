"""One run of a recipe on several processes, forks of this one that has everything imported: whole, or killed.

The processes get the variables that torchrun sets. This process does what torchrun does when one of them ends with an
error: the others get SIGTERM, and SIGKILL if they are still there after `GRACE` seconds.
"""

from __future__ import annotations

import importlib
import os
import re
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState

from parts import adaptation

from .runs import Watch, run_here

GRACE = 30.0  # seconds, as torchrun waits
LIMIT = 300.0  # for a run that nobody kills
DYING = "dying"


@dataclass(frozen=True)
class Kill:
    """Which processes are killed, and when.

    When the first of `ranks` reaches a state of the files while it saves, where it stands still; or after an event.

    Args:
        ranks: Of the processes.
        save: Number of the save, from 1; the last one is that of the model at the end of the run.
        state: Number of the state in this save. If there are less, the process is killed at the end of the save.
        stage: "transfer " for a save of the attention transfer that comes before training.
        event: In place of both: after this event of the first process (`start`, `step N`, `evaluation N`) ...
        delay: ... and so many seconds more.
    """

    ranks: tuple[int, ...]
    save: int | None = None
    state: int = 1
    stage: str = ""
    event: str | None = None
    delay: float = 0.0

    def __str__(self) -> str:
        who = "process " + " and ".join(map(str, self.ranks))
        if self.event is None:
            return f"{who}: {self.stage}save {self.save}, state {self.state}"
        return f"{who}: {self.event} + {1000 * self.delay:.0f} ms"


@dataclass
class GroupEnded:
    """What is known of a run that has ended.

    Args:
        statuses: Of the processes, by rank: an exit status, or minus the number of a signal.
        seconds_after: How long a process lived after the first one had ended with an error.
        log: Of the first process.
        events: (Seconds since the start, event), by rank.
    """

    statuses: list[int]
    seconds_after: list[float | None]
    log: str
    logs: list[str]
    events: list[list[tuple[float, str]]] = field(default_factory=list)

    def matching(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.log)


class SaveWatch(Watch):
    """A `Watch` that counts saves, and the states in each.

    Args:
        stage: Put before events, those of attention transfer before training.
    """

    def __init__(self, report: int, output: Path, watches: bool, kill: Kill | None, stage: str = "") -> None:
        super().__init__(report, output, watches, None)
        self.kill = kill if kill and kill.stage == stage else None
        self.stage = stage
        self.save = 0

    def tell(self, event: str) -> None:
        super().tell(f"{self.stage}{event}")

    def watch(self) -> None:
        self.save += 1
        self.states = 0
        self.tell(f"save {self.save}")
        if self.kill is None or self.kill.save == self.save:  # looking at all files takes long
            super().watch()

    def changed(self) -> None:
        self.states += 1
        self.tell(f"state {self.save} {self.states}")
        if self.kill and (self.save, self.states) == (self.kill.save, self.kill.state):
            self.die()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_save(args, state, control, **kwargs)
        if self.kill and self.save == self.kill.save:
            self.die()

    def die(self) -> None:
        """Stand still: the process that watches kills this one, and others with it."""
        self.tell(DYING)
        os.kill(os.getpid(), signal.SIGSTOP)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.stage:  # transfer has no save of the model at its end
            super().on_train_end(args, state, control, **kwargs)


def _watch_transfer(watch: SaveWatch) -> None:
    """Add a callback to the Trainer of attention transfer, which no recipe hands out."""
    make = adaptation._transfer_trainer

    def made(*args: Any, **kwargs: Any) -> Any:
        trainer = make(*args, **kwargs)
        trainer.add_callback(watch)
        return trainer

    adaptation._transfer_trainer = made


def run_group(
    recipe: str | Callable[..., Any],
    argv: Sequence[str],
    folder: Path,
    output: Path,
    kill: Kill | None = None,
    processes: int = 2,
    counts_states: bool = False,
    signals: tuple[str, int] | None = None,
    prepare: Callable[[], None] | None = None,
) -> GroupEnded:
    """Run a recipe on several processes; `folder` gets their logs and their cache of data sets.

    Args:
        recipe: The name of one, or a function in its place.
        signals: After this event of the first process all get a signal with this number, as from a scheduler.
        prepare: Called in every process first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("log-*-0.txt")))
    logs = [folder / f"log-{number}-{rank}.txt" for rank in range(processes)]
    main = importlib.import_module(recipe).main if isinstance(recipe, str) else recipe
    port = str(_free_port())
    group = _Group()
    for rank in range(processes):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _join(rank, processes, port)
            if prepare is not None:
                prepare()
            own = kill if kill and kill.event is None and rank == kill.ranks[0] else None
            watches = counts_states or own is not None
            _watch_transfer(SaveWatch(writer, output, watches, own, "transfer "))
            watch = SaveWatch(writer, output, watches, own)
            run_here(main, argv, folder, logs[rank], watch)
        os.close(writer)
        group.add(child, reader)
    group.follow(kill, signals)
    texts = [log.read_text(encoding="utf-8") if log.exists() else "" for log in logs]
    return GroupEnded(group.statuses, group.seconds_after, texts[0], texts, group.events())


def _join(rank: int, processes: int, port: str) -> None:
    """What torchrun tells a process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class _Group:
    """The processes of a run, from their start to their end."""

    def __init__(self) -> None:
        self.children: list[int] = []
        self.pipes: list[int] = []
        self.texts: list[bytes] = []
        self.statuses: list[Any] = []
        self.seconds_after: list[float | None] = []

    def add(self, child: int, pipe: int) -> None:
        self.children.append(child)
        self.pipes.append(pipe)
        self.texts.append(b"")
        self.statuses.append(None)
        self.seconds_after.append(None)

    def follow(self, kill: Kill | None, signals: tuple[str, int] | None) -> None:
        begun = time.monotonic()
        failed_at: float | None = None
        open_pipes = list(self.pipes)
        while None in self.statuses:
            for pipe in select.select(open_pipes, [], [], 0.02)[0]:
                if more := os.read(pipe, 65536):
                    self.texts[self.pipes.index(pipe)] += more
                else:
                    open_pipes.remove(pipe)
            if kill and self._is_time(kill):
                for rank in kill.ranks:
                    self.send(rank, signal.SIGKILL)
                kill = None
            if signals and self._told(0, signals[0]):
                for rank in range(len(self.children)):
                    self.send(rank, signals[1])
                signals = None
            self._wait()
            now = time.monotonic()
            if failed_at is None and any(self.statuses):
                failed_at = now
                for rank in range(len(self.children)):
                    self.send(rank, signal.SIGTERM)
            limit = begun + LIMIT if failed_at is None else failed_at + GRACE
            for rank, status in enumerate(self.statuses):
                if status is None and now > limit:
                    self.send(rank, signal.SIGKILL)
                if status is not None and self.seconds_after[rank] is None and failed_at is not None:
                    self.seconds_after[rank] = round(now - failed_at, 2)
        for pipe in self.pipes:
            os.close(pipe)

    def _is_time(self, kill: Kill) -> bool:
        first = kill.ranks[0]
        if kill.event is None:
            return self._told(first, f"{kill.stage}{DYING}")
        if kill.event != "start" and not self._told(first, kill.event):
            return False
        select.select([], [], [], kill.delay)
        return True

    def _told(self, rank: int, event: str) -> bool:
        return event.encode() in (line.partition(b" ")[2] for line in self.texts[rank].splitlines())

    def _wait(self) -> None:
        for rank, child in enumerate(self.children):
            if self.statuses[rank] is None:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)

    def send(self, rank: int, number: int) -> None:
        if self.statuses[rank] is None:
            os.kill(self.children[rank], number)

    def events(self) -> list[list[tuple[float, str]]]:
        found = []
        for text in self.texts:
            lines = [line.split(" ", 1) for line in text.decode().splitlines()]
            found.append([(float(seconds), event) for seconds, event in lines])
        return found
