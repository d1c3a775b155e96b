"""Memory of processes that share a sequence is measured in them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_need_less_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    script: Any = importlib.import_module("sequence_parallel_memory")
    rows = [script.run("eva", False, 8192, count) for count in (1, 2)]
    assert rows[1]["peak MiB"] < 0.75 * rows[0]["peak MiB"]
    assert rows[1]["received KiB"] > 0

    # Written, and an exit status, also where memory does not fall.
    rows[1]["peak MiB"] = rows[0]["peak MiB"]
    monkeypatch.setattr(script, "run", lambda kind, is_causal, tokens, count: rows[count - 1])
    with pytest.raises(SystemExit, match="failed"):
        script.main("eva", 8192, "1,2", tmp_path / "out.json")
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 4
