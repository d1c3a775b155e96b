"""Killing recipe runs and starting them again, a few times: the whole of it is in experiments/results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import ROOT

SCRIPT = ROOT / "scripts" / "kill_check.py"
RESULTS = ROOT / "experiments" / "results" / "kill_check.json"
TWO_PROCESSES = RESULTS.with_name("kill_check_two_processes.json")


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    arguments = ["--out", str(out), "--kinds", "favor_plus", "--kills", "4", "--seed", "1"]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert out.is_file(), done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert [kill["wrong"] for kill in found["kills"]] == [""] * 4
    assert done.returncode == 0
    assert [kill["in_save"] for kill in found["kills"]] == [True, True, False, False]
    assert found["states_of_the_files_in_all_saves"]["favor_plus"] > 100
    assert found["command"] == "python scripts/kill_check.py --out found.json --kinds favor_plus --kills 4 --seed 1"


def test_the_results_that_are_kept() -> None:
    found = json.loads(RESULTS.read_text())
    for kind in ("favor_plus", "favor_sharp", "lara", "eva"):
        kills = [kill for kill in found["kills"] if kill["kind"] == kind]
        assert len(kills) == 10
        assert sum(kill["in_save"] for kill in kills) == 5
        assert {kill["epoch"] for kill in kills} >= {1, 2}
        assert not [kill for kill in kills if kill["wrong"]]
    assert str(ROOT) not in RESULTS.read_text()


@pytest.mark.slow
def test_killed_processes_end_with_the_same_weights(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    arguments = ["--out", str(out), "--processes", "2", "--recipes", "image_classification", "--kills", "6"]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert out.is_file(), done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert [kill["wrong"] for kill in found["kills"]] == [""] * 6
    assert done.returncode == 0
    assert [kill["killed"] for kill in found["kills"]] == [[0], [1], [0, 1]] * 2
    assert [kill["in_save"] for kill in found["kills"]] == [True] * 3 + [False] * 3


def test_the_results_of_two_processes_that_are_kept() -> None:
    found = json.loads(TWO_PROCESSES.read_text())
    kills = found["kills"]
    assert len(kills) == 20
    assert sum(kill["in_save"] for kill in kills) == 10
    assert {kill["recipe"] for kill in kills} == {"text_classification", "language_modeling"}
    assert {tuple(kill["killed"]) for kill in kills} == {(0,), (1,), (0, 1)}
    assert not [kill for kill in kills if kill["wrong"]]
    assert all(seconds < 30 for kill in kills for _, seconds in kill["left"].values())
    assert str(ROOT) not in TWO_PROCESSES.read_text()
