"""`compare`: right numbers, and a model that is afterwards as it was before."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, BY_NAME, GPT2, MODELS, VIT, ModelCase, converted, matrix
from transformers import AutoModelForMaskedLM

import hf_linattn
from hf_linattn.conversion.ablation import ablated
from hf_linattn.errors import ConfigError, InputError


def batches(case: ModelCase, count: int = 2) -> list[dict[str, Any]]:
    found = []
    for seed in range(count):
        inputs = case.inputs(batch=3, seed=seed)
        if "input_ids" in inputs:
            mask = torch.ones_like(inputs["input_ids"])
            mask[0, 25:] = 0
            inputs |= {"attention_mask": mask, "labels": inputs["input_ids"]}
        found.append(inputs)
    return found


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in MODELS])
def test_a_window_over_everything_is_softmax(case: ModelCase) -> None:
    window = 6 if case is VIT else 64  # for images the side of a square: all 6 x 6 patches
    model = hf_linattn.convert(case.build(), case.settings("favor_plus", window_size=window))
    report = hf_linattn.compare(model, batches(case))
    assert len(report.layers) == 2
    assert max(layer.error for layer in report.layers) < 1e-5
    assert report.hidden_cosine == pytest.approx(1, abs=1e-5)
    assert report.logits_error == pytest.approx(0, abs=1e-4)
    assert report.argmax_agreement == 1
    assert min(layer.uniform_error for layer in report.layers) > 0.05


@pytest.mark.compat("compare")
@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2, VIT))
def test_a_linear_kind_is_off(kind: str, case: ModelCase) -> None:
    report = hf_linattn.compare(converted(case, kind), batches(case))
    assert report.kind == kind
    assert min(layer.error for layer in report.layers) > 1e-3
    assert report.logits_error is not None
    assert report.logits_error > 1e-3
    assert report.hidden_cosine < 1
    assert report.rows == 6


def test_layer_error_is_that_of_the_attention_outputs() -> None:
    """Against the definition, written out with hooks on the first layer, whose inputs are the same in both forms."""
    case = BY_NAME["bert-mlm"]
    model = hf_linattn.convert(case.build(), case.settings("favor_plus", window_size=0))
    (batch,) = batches(case, 1)
    outputs = []
    layer = model.bert.encoder.layer[0].attention.self
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output[0].detach().double()))
    for implementation in ("sdpa", "favor_plus"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            model(**batch)
    handle.remove()
    exact, linear = (output[batch["attention_mask"].bool()] for output in outputs)
    report = hf_linattn.compare(model, [batch])
    assert report.layers[0].error == pytest.approx(float((linear - exact).norm() / exact.norm()), rel=1e-4)
    assert report.tokens == int(batch["attention_mask"].sum())
    assert report.layers[0].error > 0.05  # and without a window it is far from softmax


def test_padding_does_not_count() -> None:
    model = hf_linattn.convert(BERT.build(), BERT.settings("favor_plus"))
    inputs = BERT.inputs(batch=1)
    alone = hf_linattn.compare(model, [inputs])
    padded = {name: torch.nn.functional.pad(value, (0, 9)) for name, value in inputs.items()}
    padded["attention_mask"] = (torch.arange(padded["input_ids"].shape[1]) < inputs["input_ids"].shape[1]).long()[None]
    report = hf_linattn.compare(model, [padded])
    assert report.tokens == alone.tokens
    assert report.logits_error == pytest.approx(alone.logits_error, rel=1e-3)
    assert report.hidden_cosine == pytest.approx(alone.hidden_cosine, rel=1e-4)
    assert [x.error for x in report.layers] == pytest.approx([x.error for x in alone.layers], rel=1e-3)
    assert [x.uniform_error for x in report.layers] == pytest.approx([x.uniform_error for x in alone.layers], rel=1e-3)


@pytest.mark.compat("compare")
def test_native_model_and_base_model() -> None:
    model = BERT.build().bert
    model.set_attn_implementation("lara")
    report = hf_linattn.compare(model, batches(BERT))
    assert report.kind == "lara"
    assert len(report.layers) == 2
    assert report.logits_error is None
    assert report.argmax_agreement is None
    assert "logits" not in report.to_markdown()


def test_only_converted_layers_are_listed(tmp_path: Path) -> None:
    # Loaded from disk: such a config differs from one built in code.
    BERT.build().save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    model = hf_linattn.convert(model, BERT.settings("favor_plus"), layers=[1])
    report = hf_linattn.compare(model, batches(BERT))
    assert [layer.name for layer in report.layers] == ["bert.encoder.layer.1.attention.self"]


@pytest.mark.compat("compare")
@pytest.mark.parametrize("implementation", ["favor_plus", "sdpa"])
def test_the_model_is_as_before(implementation: str) -> None:
    model = hf_linattn.convert(BERT.build(), "favor_plus").train()
    model.bert.embeddings.eval()
    model.set_attn_implementation(implementation)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hf_linattn.compare(model, batches(BERT))
    assert model.config._attn_implementation == implementation
    assert model.training
    assert not model.bert.embeddings.training
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(IndexError):
        hf_linattn.compare(model, [{"input_ids": torch.tensor([[10**6]])}])
    assert model.config._attn_implementation == implementation
    assert model.training


def test_batches_are_streamed_and_limited(capsys: pytest.CaptureFixture[str]) -> None:
    taken = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield BERT.inputs(batch=1)

    model = hf_linattn.convert(BERT.build(), "eva")
    assert hf_linattn.compare(model, endless(), max_batches=2, progress=True).rows == 2
    assert len(taken) == 2  # the next one is still in the iterator
    assert "Comparing with softmax" in capsys.readouterr().err


def test_report_forms(tmp_path: Path) -> None:
    report = hf_linattn.compare(hf_linattn.convert(BERT.build(), "favor_plus"), batches(BERT))
    values = json.loads(json.dumps(report.to_dict()))
    assert values["kind"] == "favor_plus"
    assert len(values["layers"]) == 2
    text = report.to_markdown()
    assert f"| bert.encoder.layer.0.attention.self | {report.layers[0].error:.4f} |" in text
    if importlib.util.find_spec("matplotlib"):
        assert report.plot(tmp_path / "plot.png").stat().st_size > 0
    else:
        with pytest.raises(ImportError, match=r"hf-linattn\[plot\]"):
            report.plot(tmp_path / "plot.png")


def test_bad_input_of_compare() -> None:
    native = BERT.build()
    native.set_attn_implementation("favor_plus")
    with pytest.raises(ConfigError, match="needs a converted model"):
        hf_linattn.compare(native, batches(BERT), ablations=True)
    stock = BERT.build()
    with pytest.raises(ConfigError, match="needs a model with linear attention"):
        hf_linattn.compare(stock, batches(BERT))
    model = hf_linattn.convert(stock, "favor_plus")
    with pytest.raises(InputError, match="is empty"):
        hf_linattn.compare(model, [])
    with pytest.raises(InputError, match="single batch"):
        hf_linattn.compare(model, BERT.inputs())
    with pytest.raises(InputError, match="must be a dictionary"):
        hf_linattn.compare(model, [torch.ones(1, 3)])


def test_what_compare_cannot_read() -> None:
    model, inputs = hf_linattn.convert(BERT.build(), "favor_plus"), BERT.inputs()
    with ablated(model, "shuffled_slots"), pytest.raises(ConfigError, match="outside of ablated"):
        hf_linattn.compare(model, [inputs], ablations=True)
    with pytest.raises(InputError, match="no real token"):
        hf_linattn.compare(model, [{**inputs, "attention_mask": torch.zeros_like(inputs["input_ids"])}])
    with pytest.raises(ConfigError, match="must return a number; got NoneType"):
        hf_linattn.compare(model, [inputs], score=lambda model: None)
