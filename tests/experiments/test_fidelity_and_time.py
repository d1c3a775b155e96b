"""The README's table and picture are of the committed measurements; the measuring runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import fidelity_and_time

    return fidelity_and_time


def test_table_of_the_readme(script: Any) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    top = next(i for i, line in enumerate(lines) if line.startswith("| tokens | `favor_plus`"))
    names = [name.strip().replace("`", "") for name in lines[top].split("|")[2:-1]]
    measured = json.loads(script.TIMES.read_text(encoding="utf-8"))["lengths"]
    rows = [line for line in lines[top + 2 : top + 9] if re.match(r"\| \d+ \|", line)]
    assert len(rows) == 5
    for row in rows:
        tokens, *cells = [cell.strip() for cell in row.split("|")[1:-1]]
        found = [measured[tokens][name + " slots" if name.endswith("64") else name] for name in names]
        assert [float(cell) for cell in cells] == pytest.approx(found, abs=0.0051)


def test_picture(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PICTURE", tmp_path / "picture.svg")
    script.draw()
    picture = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert all(name in picture for name in script.POINTS)


@pytest.mark.parametrize("trains", [False, True])
def test_speedups(script: Any, trains: bool) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    stock = BertModel(BertConfig(vocab_size=20, **size)).eval()
    settings = {"eva": {"kind": "eva"}, "lara, learned": {"kind": "lara", "learned": True}}
    models = {"softmax": stock, **{name: script.converted(stock, given) for name, given in settings.items()}}
    found = script.speedups(models, {"input_ids": torch.randint(20, (1, 64))}, trains=trains)
    assert found["softmax"] == 1
    assert found.keys() == models.keys()
    assert all(value > 0 for value in found.values())
    assert all(p.grad is None for model in models.values() for p in model.parameters()) is not trains
