"""FAVOR# on real weights: its features have e^7 times less variance, or better (`experiments/second_moment.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_second_moments_on_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import second_moment

    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    rows = second_moment.measure(second_moment.queries_and_keys(None, text, 512))
    assert len(rows["favor+"]) == 6
    for layer in range(5):
        base = rows["favor+"][layer]
        assert rows["saderf"][layer] <= base - 7
        assert rows["dense + centring"][layer] <= base - 10
    for layer in range(6):
        ordered = [rows[name][layer] for name in ("favor+", "gerf", "saderf", "aderf", "dense", "dense + centring")]
        assert ordered == sorted(ordered, reverse=True)
