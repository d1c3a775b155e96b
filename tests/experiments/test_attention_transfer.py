"""The controls of the experiment on attention transfer are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GPT2
from torch import Tensor

import hf_linattn
from hf_linattn import FavorPlusConfig
from hf_linattn.training import transfer_attention


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "experiments"))
    import attention_transfer

    return attention_transfer


@pytest.fixture
def model() -> Any:
    """One layer, so that a window is all that a token sees."""
    settings = FavorPlusConfig(learned=True, num_features=4, window_size=4)
    made = hf_linattn.convert(GPT2.build(n_layer=1), settings)
    transfer_attention(made, [GPT2.inputs(2)], steps=2)
    return made.eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_without_slots_a_token_sees_its_window_alone(script: Any, model: Any) -> None:
    ids = GPT2.inputs(1)["input_ids"]
    changed = ids.clone()
    changed[:, :4] = 3
    assert not torch.allclose(logits(model, changed)[:, 4:], logits(model, ids)[:, 4:], atol=1e-3)
    alone = script.without_slots(model)
    torch.testing.assert_close(logits(alone, changed)[:, 4:], logits(alone, ids)[:, 4:])


def test_shuffled_slots_are_those_of_others(script: Any, model: Any) -> None:
    ids = GPT2.inputs(1)["input_ids"]
    made = script.shuffled(model)
    assert not torch.allclose(logits(made, ids)[:, 4:], logits(model, ids)[:, 4:], atol=1e-3)
    for _ in range(3):
        made = script.shuffled(made)  # four slots: round to where they were
    assert torch.equal(logits(made, ids), logits(model, ids))


def test_perplexity_is_that_of_all_rows(script: Any, model: Any) -> None:
    rows = GPT2.inputs(5)["input_ids"]
    with torch.no_grad():
        expected = float(model(rows, labels=rows).loss.exp())
    assert script.perplexity(model, rows) == pytest.approx(expected, rel=1e-5)
