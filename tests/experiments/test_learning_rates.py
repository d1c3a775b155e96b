"""The experiment on learning rates measures the layers that it says, from where it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GPT2

import hf_linattn
from hf_linattn import FavorPlusConfig


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "experiments"))
    import learning_rates

    return learning_rates


@pytest.mark.parametrize("slot_bias", [True, False])
def test_a_layer_learns_from_its_own_calls(script: Any, slot_bias: bool) -> None:
    settings = FavorPlusConfig(learned=True, num_features=4, window_size=4)
    model = hf_linattn.convert(GPT2.build(), settings)
    ids = GPT2.inputs(4)["input_ids"].flatten()
    calls = script.calls_of(model, script.pieces(ids, 24), 2)
    layer, own = model.transformer.h[0].attn.linattn, [batch[0] for batch in calls]
    assert len(calls) == 2
    assert own[0][1].shape == own[0][0].query.shape == (4, 4, 24, 8)
    assert own[0][0].is_causal
    script.start(layer, own[0][0], slot_bias)
    assert bool(layer.slot_bias.any()) is slot_bias
    assert layer.far_offset.any()
    with torch.no_grad():
        before = script.error_of(layer, own[0])
    script.train(layer, own, 20, 0.03, 0.3)
    with torch.no_grad():
        assert script.error_of(layer, own[0]) < 0.9 * before
