"""`compare`: heads, the share of the slots, KL, what is left without a part, and windows in disguise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, BY_NAME, GPT2, TOKENS, VIT, ModelCase, converted, logits, matrix
from torch import Tensor

import hf_linattn
from hf_linattn.conversion.ablation import ablated
from hf_linattn.conversion.plots import plot_error_against_cost
from hf_linattn.conversion.report import AblatedFidelity, LayerFidelity, Report
from hf_linattn.errors import InputError
from hf_linattn.modules.registry import get_kind
from hf_linattn.ops.ablation import SLOT_SHARE, ablate
from hf_linattn.training import transfer_attention


def batches(case: ModelCase, count: int = 2) -> list[dict[str, Any]]:
    found = [case.inputs(batch=3, seed=seed) for seed in range(count)]
    for inputs in found:
        if "input_ids" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][0, 25:] = 0
    return found


def learned(kind: str, case: ModelCase, **changes: Any) -> Any:
    settings = case.settings(kind, learned=True, **{get_kind(kind).size_field: 6}, **changes)
    model = hf_linattn.convert(case.build(), settings)
    return hf_linattn.calibrate(model, [case.inputs(4)]) if hf_linattn.needs_calibration(model) else model


@pytest.mark.parametrize("make", [converted, learned])
@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2, VIT))
def test_all_parts_of_every_kind(kind: str, case: ModelCase, make: Any) -> None:
    model = make(case, kind) if make is converted else make(kind, case)
    report = hf_linattn.compare(model, batches(case), ablations=True)
    assert set(report.ablations) == {"window_alone", "slots_alone", "shuffled_slots"}
    assert report.logits_kl is not None
    assert report.logits_kl > 0
    for layer in report.layers:
        assert len(layer.head_errors) == 4
        assert min(layer.head_errors) <= layer.error <= max(layer.head_errors)
        assert layer.slot_shares is not None
        assert len(layer.slot_shares) == 4
        assert 0 < min(layer.slot_shares) < max(layer.slot_shares) < 1
    for left in report.ablations.values():
        assert left.logits_kl is not None
        assert left.logits_change is not None
        assert left.logits_kl > 0
        assert left.logits_change > 0
        assert left.hidden_cosine < 1
    assert json.loads(json.dumps(report.to_dict()))["ablations"].keys() == report.ablations.keys()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", ["favor_plus", "favor_sharp", "lara", "eva"])
def test_the_share_of_slots_is_their_part_of_the_mass(kind: str, overlap: bool) -> None:
    """Of keys with the value 0 in the window and 1 elsewhere, a query reads how much the slots weigh."""
    model = converted(BERT, kind, overlap_window=overlap)
    layer = model.bert.encoder.layer[0].attention.self
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    logits(model, **BERT.inputs())
    handle.remove()
    query, key, value = (
        part(seen[0]).unflatten(-1, (4, 8)).transpose(1, 2) for part in (layer.query, layer.key, layer.value)
    )
    for start in (0, 16, 32):  # a block of queries; values of 1 for keys that it does not see exactly
        block = slice(start, start + 8)
        reach = {"eva": 8}.get(kind, 4) if overlap else 0  # whole chunks
        far = torch.ones(TOKENS)
        far[max(0, start - reach) : start + 8 + reach] = 0
        with torch.no_grad():
            through = layer.linattn(query, key, far[:, None].expand_as(value))[:, :, block, 0]
            with ablate(SLOT_SHARE):
                share = layer.linattn(query, key, value)[:, :, block, 0]
        torch.testing.assert_close(share, through, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2, VIT))
def test_shares_of_what_is_left(kind: str, case: ModelCase) -> None:
    model = converted(case, kind)
    with ablated(model, "window_alone"):
        report = hf_linattn.compare(model, batches(case, 1))
    assert {share for layer in report.layers for share in layer.slot_shares or (1.0,)} == {0.0}
    assert report.is_window_in_disguise is True
    if kind != "eva":  # of which the first tokens then read nothing, and global tokens stay
        with ablated(model, "slots_alone"):
            report = hf_linattn.compare(model, batches(case, 1))
        assert [x for layer in report.layers for x in layer.slot_shares or ()] == pytest.approx([1.0] * 8)


@pytest.mark.parametrize("kind", ["favor_plus", "favor_sharp", "lara", "eva"])
def test_rows_that_fit_in_the_window(kind: str) -> None:
    report = hf_linattn.compare(converted(BERT, kind, window_size=64), batches(BERT), ablations=True)
    assert max(error for layer in report.layers for error in layer.head_errors) < 1e-5
    assert max(share for layer in report.layers for share in layer.slot_shares or (1.0,)) == 0
    assert report.logits_kl == pytest.approx(0, abs=1e-8)
    assert report.ablations["window_alone"].logits_change == pytest.approx(0, abs=1e-8)
    assert report.is_window_in_disguise is True


def test_kl_is_that_of_the_predictions_of_real_tokens() -> None:
    model, (batch,) = converted(BERT, "favor_plus"), batches(BERT, 1)
    linear = logits(model, **batch)
    model.set_attn_implementation("sdpa")
    softmax, real = logits(model, **batch), batch["attention_mask"].bool()
    first, second = (z[real].double().log_softmax(-1) for z in (softmax, linear))
    expected = (first.exp() * (first - second)).sum(-1).mean()
    model.set_attn_implementation("favor_plus")
    assert hf_linattn.compare(model, [batch]).logits_kl == pytest.approx(float(expected), rel=1e-4)


def test_a_single_logit_has_no_distribution() -> None:
    case = BY_NAME["bert-classifier"]
    model = hf_linattn.convert(case.build(num_labels=1), case.settings("favor_plus"))
    report = hf_linattn.compare(model, batches(case, 1))
    assert report.logits_kl is None
    assert report.logits_error is not None


def test_scores_of_all_forms() -> None:
    model, (batch,) = converted(GPT2, "favor_plus"), batches(GPT2, 1)
    asked: list[str] = []

    def score(given: Any) -> float:
        asked.append(given.config._attn_implementation)
        assert not given.training
        with torch.no_grad():
            return float(given(**batch, labels=batch["input_ids"], use_cache=False).loss)

    expected = {"linear": score(model.eval())}
    with ablated(model, "window_alone"):
        expected["window_alone"] = score(model)
    model.set_attn_implementation("sdpa")
    expected["softmax"] = score(model)
    model.set_attn_implementation("favor_plus")
    asked.clear()
    report = hf_linattn.compare(model.train(), [batch], ablations=True, score=score)
    assert asked == ["favor_plus"] * 4 + ["sdpa"]
    assert (report.score, report.softmax_score) == (expected["linear"], expected["softmax"])
    assert report.ablations["window_alone"].score == expected["window_alone"]
    assert model.training
    assert model.config._attn_implementation == "favor_plus"
    table = report.to_markdown()
    assert f"| softmax | 0 | 1 | {report.softmax_score:.4f} |" in table
    assert "| window alone | " in table


def test_a_model_without_a_window_is_none() -> None:
    report = hf_linattn.compare(
        converted(BERT, "favor_plus", window_size=0, num_global_tokens=0), batches(BERT), ablations=True
    )
    assert set(report.ablations) == {"slots_alone", "shuffled_slots"}
    assert [x for layer in report.layers for x in layer.slot_shares or ()] == pytest.approx([1.0] * 8)
    assert report.is_window_in_disguise is False
    assert "reads every key through slots" in report.to_markdown()


# -- windows in disguise --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2))
def test_a_model_that_uses_its_slots(kind: str, case: ModelCase) -> None:
    model = learned(kind, case)
    transfer_attention(model, batches(case), steps=12)
    report = hf_linattn.compare(model, batches(case), ablations=True)
    assert report.is_window_in_disguise is False
    assert "Its slots matter: with " in report.to_markdown()


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2))
def test_a_model_that_does_not(kind: str, case: ModelCase, headless: bool) -> None:
    """Its slots have so little mass that they change nothing."""
    model = learned(kind, case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("far_offset"):
                parameter.sub_(9.0)
    model = model.base_model if headless else model
    report = hf_linattn.compare(model, batches(case), ablations=True)
    assert max(layer.slot_share or 0 for layer in report.layers) > 0.0
    assert report.is_window_in_disguise is True
    assert "sliding window in disguise" in report.to_markdown()


def test_what_was_not_looked_at_is_not_known() -> None:
    report = hf_linattn.compare(converted(BERT, "favor_plus"), batches(BERT))
    assert report.is_window_in_disguise is None
    assert "ablations=True" in report.verdict()
    assert "disguise" not in report.to_markdown()


@pytest.mark.parametrize(
    ("share", "window", "shuffled", "expected"),
    [(0.3, 0.2, 0.2, False), (0.3, 0.009, 0.2, True), (0.3, 0.2, 0.009, True), (0.009, 0.2, 0.2, True)],
)
def test_the_rule(share: float, window: float, shuffled: float, expected: bool) -> None:
    layer = LayerFidelity("layer", 0.1, 0.5, 0.9, head_errors=(0.1, 0.1), slot_shares=(share, share))
    parts = {
        name: AblatedFidelity(0.3, 0.9, change, 0.1)
        for name, change in {"window_alone": window, "shuffled_slots": shuffled}.items()
    }
    report = Report("favor_plus", [layer], 0.99, 0.1, 0.9, 1, 40, logits_kl=0.1, ablations=parts)
    assert report.is_window_in_disguise is expected


# -- pictures -------------------------------------------------------------------------------------------------------
def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = hf_linattn.compare(converted(BERT, "favor_plus"), batches(BERT))
    assert report.plot(tmp_path / "heads.png").stat().st_size > 0
    points = [("FAVOR+", 16, report), ("FAVOR+", 32, report), ("EVA", 32, report)]
    assert plot_error_against_cost(points, tmp_path / "cost.svg", cost="slots").stat().st_size > 0
    with pytest.raises(InputError, match="at least one point"):
        plot_error_against_cost([], tmp_path / "none.png")
    with pytest.raises(InputError, match="must be > 0"):
        plot_error_against_cost([("EVA", 0, report)], tmp_path / "none.png")


def test_tables_of_heads() -> None:
    report = hf_linattn.compare(converted(BERT, "favor_plus"), batches(BERT))
    table = report.to_markdown(heads=True)
    errors = " | ".join(f"{error:.4f}" for error in report.layers[0].head_errors)
    assert "| error | 0 | 1 | 2 | 3 |" in table
    assert f"| bert.encoder.layer.0.attention.self | {errors} |" in table
    assert "| slot share | 0 | 1 | 2 | 3 |" in table
