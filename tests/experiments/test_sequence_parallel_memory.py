"""Memory of processes that share a sequence is measured in them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_need_less_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a program: what the heap of a worker of pytest holds would decide how much of it becomes resident."""
    out = tmp_path / "out.json"
    command = ["sequence_parallel_memory.py", "--kinds", "eva", "--tokens", "4096", "--processes", "1,2", "--out", out]
    subprocess.run([sys.executable, *command], cwd=ROOT / "experiments", check=True)
    rows = json.loads(out.read_text())["rows"]
    for one, two in (rows[:2], rows[2:]):
        assert two["peak MiB"] < 0.75 * one["peak MiB"]
        assert two["received KiB"] > 0

    # Written, and an exit status, also where memory does not fall.
    rows[1]["peak MiB"] = rows[0]["peak MiB"]
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    script: Any = importlib.import_module("sequence_parallel_memory")
    monkeypatch.setattr(script, "run", lambda kind, is_causal, tokens, count: rows[2 * is_causal + count - 1])
    with pytest.raises(SystemExit, match="failed"):
        script.main("eva", 4096, "1,2", out)
    assert len(json.loads(out.read_text())["rows"]) == 4
