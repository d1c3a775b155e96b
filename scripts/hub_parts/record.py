"""A run in parts: each on its own, and a file of results that is written after every one of them.

    record = Record("check.json", title="The check", facts={"versions": {...}}, columns={"load": "loaded"})
    record.run("bert/load", load)                               # `load()` returns what to keep, a dictionary or None
    record.run("bert/eva/convert", convert, needs=["bert/load"])
    record.finish()

A part that raises is recorded with its traceback, and the run goes on; parts that need it are skipped. A part may
raise `Refused` where a refusal is the right answer. The file is replaced as a whole, so whoever reads it finds JSON,
and after a crash the part that was running is in it.

Names of parts are paths, `row/column` or `group/row/column`: `markdown()` makes tables of them, one for each depth.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from isolated import write_atomically

OK, FAILED, SKIPPED, REFUSED, RUNNING, INTERRUPTED = "ok", "failed", "skipped", "refused", "running", "interrupted"
GOOD = (OK, REFUSED, SKIPPED)
LONGEST = 300  # characters of a message in a table; the traceback has all of it


class Refused(Exception):
    """Raised by a part for which a refusal is the documented answer, and came."""


class OnPurpose(Exception):
    """What a part fails with that was to fail on purpose."""


@dataclass
class Part:
    """One part of a run.

    Args:
        values: What it returned. `shown` among them is its cell in the table.
        error: Type and first line of what it raised, or why it was skipped or refused.
        on_purpose: It was made to fail, to see whether failures are recorded.
    """

    name: str
    status: str
    started: str
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    traceback: list[str] | None = None
    on_purpose: bool = False

    def cell(self) -> str:
        """What a table says of it."""
        if self.status == OK:
            return str(self.values.get("shown", OK))
        if self.status == REFUSED:
            return "refused, as documented"
        if self.status == SKIPPED:
            return f"skipped: {self.error}"
        return f"**{self.status}**" + (" (on purpose)" if self.on_purpose else "")

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is empty is left out."""
        found = {"part": self.name, "status": self.status, "started": self.started, "seconds": round(self.seconds, 2)}
        rest = {"values": self.values, "error": self.error, "traceback": self.traceback, "on_purpose": self.on_purpose}
        return found | {name: value for name, value in rest.items() if value}


class Record:
    """The parts of a run, and the file they are in.

    Args:
        path: The JSON file.
        title: Of the file and the tables.
        facts: Anything about the run as a whole; may be changed while it goes on.
        columns: Last component of a part's name -> heading, in the order of the tables.
        fail: Names of parts that are made to fail, after they have done their work.
        on_part: Called with every part when it has ended.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        title: str,
        facts: Mapping[str, Any],
        columns: Mapping[str, str],
        fail: Iterable[str] = (),
        on_part: Callable[[Part], None] = lambda part: None,
    ) -> None:
        self.path, self.title, self.columns = Path(path), title, dict(columns)
        self.facts = dict(facts)
        self.fail = frozenset(fail)
        self.on_part = on_part
        self.parts: dict[str, Part] = {}
        self.started, self.finished = _now(), None
        self.write()

    def run(self, name: str, function: Callable[[], Mapping[str, Any] | None], needs: Sequence[str] = ()) -> bool:
        """Run a part, unless one that it needs has not gone well. Returns whether this one has.

        Only an interruption (Ctrl-C, an exit) comes out of it.
        """
        broken = [other.rsplit("/", 1)[-1] for other in needs if self.status(other) != OK]
        if broken:
            self.skip(name, f"needs {', '.join(broken)}")
            return False
        part = self.parts[name] = Part(name, RUNNING, _now())
        self.write()
        begin = time.perf_counter()
        try:
            part.values = dict(function() or {})
            if name in self.fail:
                raise OnPurpose("made to fail on purpose")
            part.status = OK
        except Refused as refusal:
            part.status, part.error = REFUSED, first_line(refusal)
        except Exception as error:
            part.status, part.error = FAILED, f"{type(error).__name__}: {first_line(error)}"
            part.traceback = _traceback()
            part.on_purpose = isinstance(error, OnPurpose)
        except BaseException as error:
            part.status, part.error = INTERRUPTED, type(error).__name__
            raise
        finally:
            part.seconds = time.perf_counter() - begin
            self.write()
            self.on_part(part)
        return part.status == OK

    def skip(self, name: str, reason: str) -> None:
        """Record that a part was not run."""
        part = self.parts[name] = Part(name, SKIPPED, _now(), error=reason)
        self.write()
        self.on_part(part)

    def status(self, name: str) -> str | None:
        """How a part went; `None` if it has not been run."""
        return self.parts[name].status if name in self.parts else None

    @property
    def failed(self) -> list[Part]:
        """Parts that did not go well, skipped ones aside."""
        return [part for part in self.parts.values() if part.status not in GOOD]

    def finish(self) -> None:
        """Say in the file that the run came to its end."""
        self.finished = _now()
        self.write()

    def to_dict(self) -> dict[str, Any]:
        counts: dict[str, int] = {}
        for part in self.parts.values():
            counts[part.status] = counts.get(part.status, 0) + 1
        return {
            "title": self.title,
            **self.facts,
            "started": self.started,
            "finished": self.finished,
            "complete": self.finished is not None,
            "made_to_fail": sorted(self.fail),
            "counts": counts,
            "parts": [part.to_dict() for part in self.parts.values()],
        }

    def write(self) -> None:
        """Replace the file: a reader finds the old or the new one, never half of one."""
        write_atomically(self.path, json.dumps(self.to_dict(), indent=1, default=str) + "\n")

    def grids(self) -> list[list[list[str]]]:
        """Tables as rows of cells, headings first: one for each depth of names."""
        rows: dict[int, dict[str, dict[str, Part]]] = {}
        for part in self.parts.values():
            *row, column = part.name.split("/")
            rows.setdefault(len(row), {}).setdefault("/".join(row), {})[column] = part
        found = []
        for depth in sorted(rows):
            used = [name for name in self.columns if any(name in parts for parts in rows[depth].values())]
            grid = [["", *(self.columns[name] for name in used), "seconds"]]
            for row_name, parts in rows[depth].items():
                cells = [parts[name].cell() if name in parts else "" for name in used]
                grid.append([row_name, *cells, f"{sum(part.seconds for part in parts.values()):.1f}"])
            found.append(grid)
        return found

    def markdown(self, introduction: str = "") -> str:
        """Title, tables, and what went wrong."""
        lines = [f"# {self.title}", "", *([introduction, ""] if introduction else [])]
        for head, *body in self.grids():
            lines += [_row(head), _row(["---"] * len(head)), *map(_row, body), ""]
        told = [part for part in self.parts.values() if part.error and part.status != SKIPPED]
        lines += [f"- `{part.name}`: {part.cell()}. {_escape(part.error or '')}" for part in told]
        if self.finished is None:
            lines += ["", "The run was cut short: parts at its end are missing."]
        return "\n".join(lines).rstrip() + "\n"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, cut where it is very long; paths of this machine are shortened."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(_shorten(lines[0]), LONGEST, placeholder=" ...") if lines else ""


def _traceback() -> list[str]:
    return _shorten(traceback.format_exc()).rstrip().splitlines()


def _shorten(text: str) -> str:
    """Without the folders that modules are imported from: a results file is made to be shown around."""
    for folder in sorted({os.path.abspath(entry) for entry in sys.path} - {os.sep}, key=len, reverse=True):
        text = text.replace(folder + os.sep, "")
    return text.replace(str(Path.home()) + os.sep, "~" + os.sep) if Path.home() != Path(os.sep) else text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escape, cells)) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
