"""Parts in processes of their own: what ends one, what it leaves behind, and that the others go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import ROOT

sys.path.append(str(ROOT / "scripts"))

from isolated import Outcome, Part, run_parts, side_by_side, write_atomically  # noqa: E402

# What the process of a part does with `say`, which writes one line to the parent.
PROGRAMS = {
    "good": "say(finding={'x': 1}); say(finding={'x': 2})",
    "raises": "say(finding={'x': 1}); print('before the end'); say(reason='ValueError: no'); sys.exit(1)",
    "crashes": "say(finding={'x': 1}); os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "say(finding={'x': 1}); time.sleep(60)",
    "stays": "say(finding={'x': 1}); os.close(pipe); time.sleep(60)",
    "leaves a child": "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); say(finding={'x': 1})",
}
PREAMBLE = """
import json, os, signal, subprocess, sys, time
pipe = int(sys.argv[1])
def say(**message):
    os.write(pipe, (json.dumps(message) + "\\n").encode())
"""


def nothing(_: Any) -> Iterator[dict[str, Any]]:
    return iter(())


def part(name: str, seconds: float = 10.0, *, is_timed: bool = True) -> Part:
    return Part(name, name.capitalize(), seconds, nothing, is_timed)


def run(*names: str, seconds: float = 30.0, saved: list[int] | None = None, first: float = 10.0) -> dict[str, Outcome]:
    """The outcomes by name; `first` is the share of the first part, of which the others have 10."""

    def command(chosen: Part, pipe: int) -> list[str]:
        return [sys.executable, "-c", PREAMBLE + PROGRAMS[chosen.name], str(pipe)]

    def save(outcomes: list[Outcome]) -> None:
        if saved is not None:
            saved.append(sum(len(outcome.findings) for outcome in outcomes))

    parts = [part(name, 10.0 if number else first) for number, name in enumerate(names)]
    found = run_parts(parts, command, seconds=seconds, save=save)
    return {outcome.name: outcome for outcome in found}


def test_a_failure_is_recorded_and_the_next_part_runs() -> None:
    found = run("raises", "crashes", "good")
    assert [(o.status, len(o.findings)) for o in found.values()] == [("failed", 1), ("failed", 1), ("passed", 2)]
    assert found["raises"].reason == "ValueError: no"
    assert found["raises"].log == ["before the end"]
    assert found["crashes"].reason == "the process ended with -11"
    assert found["good"].log == []


@pytest.mark.parametrize("name", ["hangs", "stays"])
def test_time_is_limited_and_findings_are_kept(name: str) -> None:
    found = run(name, "good", seconds=4.0)
    assert found[name].status == "timed out"
    assert found[name].findings == [{"x": 1}]
    assert found[name].seconds == pytest.approx(found[name].limit, abs=1.0)
    assert found["good"].status == "passed"


def test_what_a_part_started_ends_with_it() -> None:
    assert run("leaves a child")["leaves a child"].seconds < 8


def test_parts_share_the_time_and_pass_on_what_they_leave() -> None:
    found = run("good", "raises", seconds=20.0)
    assert found["good"].limit == pytest.approx(10.0, abs=0.1)
    assert found["raises"].limit > 15


def test_nothing_starts_when_the_time_is_over() -> None:
    found = run("hangs", "good", seconds=1.5, first=1e6)
    assert found["good"].status == "skipped"
    assert "are over" in found["good"].reason
    assert not found["good"].is_failure


def test_results_are_saved_after_every_finding() -> None:
    saved: list[int] = []
    run("good", "crashes", saved=saved)
    assert saved == sorted(saved)
    assert saved[-1] == 3
    assert len(saved) >= 4


def test_parts_that_measure_time_run_alone() -> None:
    parts = [part("a", is_timed=False), part("b", is_timed=False), part("c"), part("d"), part("e", is_timed=False)]
    assert [[p.name for p in group] for group in side_by_side(parts)] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "first")
    write_atomically(path, "second")
    assert path.read_text() == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
