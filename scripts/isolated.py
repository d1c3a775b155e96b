"""Parts of a long check, each in a process of its own with a time limit, and what they find written as it comes.

A part that raises, crashes, hangs or breaks the GPU's state is recorded, and the next one starts in a fresh process.
The parent reads one JSON object per line from a pipe and rewrites the results file after each, so that a run that is
cut short keeps all it has found.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Finding = dict[str, Any]
LOG_LINES = 60  # of a failed part's output that the results keep


class PartFailed(Exception):
    """A part came to its end, and what it found is not what it should be."""


@dataclass(frozen=True)
class Part:
    """One part.

    Args:
        name: Unique; also what selects it on the command line.
        title: What it shows, for people.
        seconds: Its time limit, the start of its process included. Parts share the time of the whole run in this
            proportion: what one leaves is for those that follow.
        run: From a context, the findings, JSON objects, as they come. A finding with `"failed"` fails the part.
        is_timed: It measures time, and so runs alone. Others run beside those next to them that do not either.
    """

    name: str
    title: str
    seconds: float
    run: Callable[[Any], Iterator[Finding]]
    is_timed: bool = True


@dataclass
class Outcome:
    """What is known of a part: status "passed", "failed", "timed out", "skipped" or, on the way, "running"."""

    name: str
    title: str
    status: str = "running"
    seconds: float = 0.0
    limit: float = 0.0
    reason: str = ""
    log: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_failure(self) -> bool:
        return self.status in ("failed", "timed out")

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in ("", [])}


def run_child(part: Part, context: Any, pipe: int, *, must_fail: bool = False) -> int:
    """The child's side: run a part and write its findings to the pipe. Returns the exit status."""

    def say(**message: Any) -> None:
        os.write(pipe, (json.dumps(message) + "\n").encode())

    try:
        if must_fail:
            raise PartFailed("made to fail on purpose (--fail)")
        failures = 0
        for finding in part.run(context):
            failures += bool(finding.get("failed"))
            say(finding=finding)
        if failures:
            raise PartFailed(f"{failures} finding(s) failed")
    except BaseException as error:
        first = (str(error).strip().splitlines() or [""])[0]
        say(reason=first if isinstance(error, PartFailed) else f"{type(error).__name__}: {first}"[:400])
        traceback.print_exc()
        return 1
    return 0


def run_parts(
    parts: Sequence[Part],
    command: Callable[[Part, int], list[str]],
    *,
    seconds: float,
    save: Callable[[list[Outcome]], None],
    report: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Run parts in order, those that measure no time side by side; a failure never stops the next.

    Args:
        command: From a part and the number of an open pipe, the command line of its process.
        seconds: For all parts together. A part that would start after that is skipped; one that is running is ended.
        save: Called with all outcomes so far after every finding; never twice at a time.
        report: Called when a part starts and when it ends.
    """
    start = time.monotonic()
    outcomes: list[Outcome] = []
    lock = threading.Lock()

    def saved() -> None:
        with lock:
            save(outcomes)

    def work(part: Part, outcome: Outcome) -> None:
        report(outcome)
        _run_one(part, outcome, command, saved)
        report(outcome)
        saved()

    groups = side_by_side(parts)
    for index, group in enumerate(groups):
        left = seconds - (time.monotonic() - start)
        weight = sum(max(part.seconds for part in later) for later in groups[index:])
        new = [Outcome(part.name, part.title) for part in group]
        outcomes += new
        for part, outcome in zip(group, new, strict=True):
            outcome.limit = round(max(0.0, left * part.seconds / weight), 1)
            if outcome.limit < 1:
                outcome.status, outcome.reason = "skipped", f"the {seconds:.0f} s of the run are over"
                report(outcome)
        running = [pair for pair in zip(group, new, strict=True) if pair[1].status == "running"]
        with ThreadPoolExecutor(max(1, len(running))) as pool:
            list(pool.map(lambda pair: work(*pair), running))
        saved()
    return outcomes


def side_by_side(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts in order, in groups that run at the same time: neighbours that measure no time, and each other one."""
    groups: list[list[Part]] = []
    for part in parts:
        if groups and not part.is_timed and not groups[-1][-1].is_timed:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _run_one(
    part: Part,
    outcome: Outcome,
    command: Callable[[Part, int], list[str]],
    save: Callable[[], None],
) -> None:
    start = time.monotonic()
    reader, writer = os.pipe()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command(part, writer),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=[writer],
            start_new_session=True,  # what the part starts ends with it
        )
        os.close(writer)
        try:
            in_time = _read(reader, outcome, start + outcome.limit, save)
            if in_time:
                try:
                    process.wait(max(1.0, start + outcome.limit - time.monotonic()))
                except subprocess.TimeoutExpired:  # all is said, and it does not end
                    in_time = False
        finally:
            os.close(reader)
            _end(process)
        outcome.seconds = round(time.monotonic() - start, 1)
        if not in_time:
            outcome.status, outcome.reason = "timed out", outcome.reason or f"longer than {outcome.limit:.0f} s"
        elif process.returncode:
            outcome.status = "failed"
            outcome.reason = outcome.reason or f"the process ended with {process.returncode}"
        else:
            outcome.status = "passed"
        if outcome.is_failure:
            log.seek(0)
            outcome.log = log.read().splitlines()[-LOG_LINES:]


def _read(pipe: int, outcome: Outcome, deadline: float, save: Callable[[], None]) -> bool:
    """Findings until the pipe closes; False if the deadline came first."""
    waiting = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            got = os.read(pipe, 1 << 16)
            if not got:
                return True
            *lines, waiting = (waiting + got).split(b"\n")
            for line in lines:
                message = json.loads(line)
                outcome.reason = message.get("reason", outcome.reason)
                if "finding" in message:
                    outcome.findings.append(message["finding"])
            save()
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def write_atomically(path: Path, text: str) -> None:
    """A reader, or a run that is ended in the middle, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
