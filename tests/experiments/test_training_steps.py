"""Training steps of saved models are timed side by side."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

import hf_linattn
from scripts.kill_parts.inputs import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dropout", [True, False])
def test_models_side_by_side(dropout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    script: Any = importlib.import_module("training_steps")
    build(tmp_path, 6)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    hf_linattn.convert(model, "eva").save_pretrained(tmp_path / "eva")
    for file in (tmp_path / "model").glob("*token*"):
        (tmp_path / "eva" / file.name).write_bytes(file.read_bytes())
    made: list[Any] = []
    load = AutoModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(
        script.AutoModelForSequenceClassification,
        "from_pretrained",
        lambda *args, **options: made.append(load(*args, **options)) or made[-1],
    )
    folders = [tmp_path / "model", tmp_path / "eva"]
    script.main(folders, tmp_path / "data.jsonl", attention_dropout=dropout, seconds=0.1, out=tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["model", "eva"]
    assert found["rows"][0]["times as fast"] == 1
    assert all(row["CPU seconds"] > 0 for row in found["rows"])
    assert found["tokens"] > 2
    assert (made[0].config.attention_probs_dropout_prob > 0) == dropout
    assert all(model.training for model in made)
