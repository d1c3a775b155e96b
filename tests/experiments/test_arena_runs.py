"""The experiment on Long Range Arena trains, scores and times what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")  # not the user's
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "experiments"))
    import arena_runs

    return arena_runs


def test_every_kind_is_trained_scored_and_timed(script: Any, tmp_path: Path, capsys: Any) -> None:
    rows = pa.table({"source": [f"[MAX {i} 2 ]" for i in range(10)] * 2, "target": [max(i, 2) for i in range(10)] * 2})
    pq.write_table(rows, tmp_path / "rows.parquet")
    settings = {
        "task": "listops",
        "train_file": str(tmp_path / "rows.parquet"),
        "test_file": str(tmp_path / "rows.parquet"),
        "do_train": True,
        "do_predict": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "hidden_size": 16,
        "max_length": 32,
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(settings))
    script.main(
        tmp_path / "tiny.yaml",
        kinds="softmax,eva",
        settings='{"eva": {"window_size": 4}}',
        flags="--learning_rate 0.01",
        runs=tmp_path / "runs",
        tokens=16,
        batch=2,
        seconds=0.01,
        out=tmp_path / "out.json",
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["majority"], found["test_rows"]) == (0.3, 20)
    softmax, eva = found["rows"]
    assert (softmax["kind"], eva["kind"]) == ("softmax", "eva")
    assert softmax["times as fast"] == 1
    assert eva["times as fast"] == pytest.approx(softmax["step"] / eva["step"])
    assert 0 <= eva["accuracy"] <= 1
    assert found["runs"]["eva"]["attention"]["window_size"] == 4
    assert found["runs"]["softmax"]["training"]["learning_rate"] == 0.01
    assert "Majority class: 0.300 of 20 rows" in capsys.readouterr().out
