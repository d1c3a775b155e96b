"""The experiment on short inputs (`experiments/exact_below.py`): what it scores, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VOCAB, converted


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "experiments"))
    import exact_below

    return exact_below


def test_scores_of_an_encoder(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LENGTHS", (12, 20))
    rows = torch.randint(3, VOCAB, (3, 28))
    texts = {length: rows[:, :length] for length in (12, 20, 28)}
    stock, model = BERT.build().bert, converted(BERT, "favor_plus").bert
    short, long = script.encoder_scores(script.set_border(model, 12), stock, texts).values()
    assert short["to softmax"] > 1 - 1e-9 > long["to softmax"]
    assert script.encoder_scores(script.set_border(model, 0), stock, texts)["20"] == long


def test_scores_of_a_decoder(script: Any) -> None:
    rows = torch.randint(3, VOCAB, (2, 300))
    stock, model = GPT2.build(n_positions=300), converted(GPT2, "eva")
    assert script.decoder_scores(stock, rows)["all"] > 1
    assert script.set_border(model, 7).transformer.h[0].attn.linattn.config.exact_below == 7
