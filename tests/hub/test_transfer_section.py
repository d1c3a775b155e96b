"""The section of a model card on attention transfer: what was trained on what, and how close to softmax it came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cases import BERT, BY_NAME, KINDS, VIT, ModelCase
from huggingface_hub import ModelCard
from test_card_text import NASTY, elements

import hf_linattn
from hf_linattn.hub import TransferRecord, render_card


def converted(kind: str = "favor_plus", case: ModelCase = BERT, **options: Any) -> Any:
    return hf_linattn.convert(case.build(), case.settings(kind, learned=True), **options)


def fidelity(error: float, **more: Any) -> dict[str, Any]:
    layers = [{"name": f"layer.{i}", "error": error, "slot_shares": (0.25, 0.75)} for i in range(2)]
    return {"layers": layers, "rows": 8, "hidden_cosine": 0.9, "logits_kl": 0.1, "argmax_agreement": 0.5, **more}


RECORD = TransferRecord(
    steps=200,
    rows_per_step=4,
    rows="rows of 512 tokens",
    data="WikiText-2",
    learning_rate=1e-2,
    seed=7,
    before=fidelity(0.5),
    after=fidelity(0.125),
)


def body(record: TransferRecord, model: Any = None) -> str:
    return ModelCard(render_card(model or converted(), transfer=record)).text


@pytest.mark.parametrize("case", [BERT, VIT, BY_NAME["gpt2"]], ids=lambda case: case.name)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained(kind: str, case: ModelCase) -> None:
    model = converted(kind, case)
    trained = sum(value.numel() for name, value in model.named_parameters() if ".linattn." in name)
    text = body(RECORD, model)
    for said in (
        "| data | WikiText-2 |",
        "| steps | 200, of 4 rows of 512 tokens each |",
        "| layers | 0, 1 |",
        f"| trained parameters | {trained:,} of {sum(value.numel() for value in model.parameters()):,} |",
        "| learning rate | `0.01` |",
        "| seeds | `7` (order of the data), `0` (where the maps start) |",
        "On 8 rows of 512 tokens that were not trained on.",
        "| `layer.1` | 0.500 | 0.125 | 50.0% |",
        "| before transfer | 0.9000 | 0.1000 | 50.0% |",
        "by as much as is said above",
    ):
        assert said in text
    size = "one for every" if kind == "eva" and case.is_causal else "per head |"
    assert size in next(line for line in text.splitlines() if line.startswith("| slots |"))
    for absent in ("second stage", "calibrated before", "slots shuffled", "| softmax |"):
        assert absent not in text


def test_layers_stages_and_calibration() -> None:
    model = converted()
    text = body(replace(RECORD, layers=[1], second_stage_steps=50, calibration_rows=64), model)
    trained = sum(value.numel() for name, value in model.named_parameters() if ".1." in name and ".linattn." in name)
    assert "| layers | 1 |" in text
    assert f"| trained parameters | {trained:,} of" in text
    assert "| second stage | 50 steps more" in text
    assert "| calibrated before on | 64 rows of 512 tokens |" in text


def test_controls_scores_and_the_verdict() -> None:
    left = {"hidden_cosine": 0.5, "logits_kl": 2.0, "score": 90.0}
    after = fidelity(
        0.125,
        score=77.5,
        softmax_score=77.0,
        ablations={"window_alone": left, "shuffled_slots": {**left, "score": 99}},
    )
    verdict = "This model is a sliding window in disguise on these inputs."
    text = body(replace(RECORD, after=after, score_name="perplexity", verdict=verdict))
    assert "| KL of predictions, nats | equal predictions | perplexity |" in text
    assert "| softmax | 1.0000 | 0.0000 | 100.0% | 77 |" in text
    assert "| before transfer | 0.9000 | 0.1000 | 50.0% |  |" in text
    assert "| **after transfer** | 0.9000 | 0.1000 | 50.0% | 77.5 |" in text
    assert "| window alone | 0.5000 | 2.0000 |  | 90 |" in text
    assert "| slots shuffled | 0.5000 | 2.0000 |  | 99 |" in text
    assert "slots alone |" not in text
    assert f"\n{verdict}\n" in text
    text = body(replace(RECORD, after={**after, "is_window_in_disguise": True}, verdict=verdict))
    assert f"\n**{verdict}**\n" in text


def test_nothing_was_compared() -> None:
    text = body(replace(RECORD, before=None, after=None))
    assert "## Attention transfer" in text
    assert "How close" not in text
    assert "no quality was measured" in text


@pytest.mark.parametrize("text", NASTY, ids=ascii)
@pytest.mark.parametrize("field", ["data", "rows", "verdict", "score_name"])
def test_text_of_others(field: str, text: str) -> None:
    after = fidelity(0.125, score=1.0)
    plain = replace(RECORD, after=after, verdict="Fine.")
    model = converted()
    expected, found = (
        elements(render_card(model, transfer=record)) for record in (plain, replace(plain, **{field: text or "<b>"}))
    )
    assert found == expected
