"""Stock checkpoints into converted classes, and what a loaded model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, BY_NAME, GPT2, ModelCase, largest, logits, matrix, ready
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    EncoderDecoderModel,
)

import hf_linattn
from hf_linattn.errors import CheckpointError, ConfigError
from hf_linattn.models import COUNTERPARTS
from hf_linattn.modules.base import LinearAttention

LOADING: list[dict[str, Any]] = [
    {},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"dtype": "auto"},
    {"device_map": {"": "cpu"}},
    {"device_map": "auto"},
    {"device_map": "cpu", "dtype": torch.bfloat16},
]


# -- stock checkpoints ----------------------------------------------------------------------------------------------
@pytest.mark.compat("save and load")
@pytest.mark.parametrize("arguments", LOADING, ids=str)
@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2))
def test_stock_checkpoint_into_a_converted_class(
    kind: str, case: ModelCase, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The new state is what `convert` gives, however the model is loaded, and nothing is left uninitialised."""
    original = case.build()
    original.save_pretrained(tmp_path)
    expected = hf_linattn.convert(original, case.settings(kind))
    cls = COUNTERPARTS[case.stock]
    # Memory that Transformers hands out for missing tensors is often zero by luck: fill it with something else.
    filler = [torch.full((4096,), float("nan")) for _ in range(200)]
    del filler
    loaded = cls.from_pretrained(tmp_path, linear_attention=case.settings(kind), **arguments)
    assert loaded.config.model_type == f"linattn_{case.name[:4]}"
    assert loaded.config.linear_attention == expected.config.linear_attention
    assert loaded.config._attn_implementation == kind
    target = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        got = target[name]
        assert not got.is_meta
        if "linattn" in name and name not in dict(expected.named_parameters()):
            assert got.dtype == torch.float32
        assert torch.equal(got, tensor.to(got.dtype)), name
    if "dtype" not in arguments:
        ours, theirs = (logits(ready(model), **case.inputs()) for model in (loaded, expected))
        assert largest(ours - theirs) < 1e-5


@pytest.mark.parametrize("kind", ["favor_plus", "favor_sharp"])
def test_a_checkpoint_keeps_its_number_of_features(kind: str, tmp_path: Path) -> None:
    """Version 0.1 wrote 256, then the default, into the settings; what is not written is today's default."""
    model = hf_linattn.convert(BERT.build(), {"kind": kind})
    assert model.config.linear_attention["num_features"] == 64
    older = {**model.config.linear_attention, "num_features": 256}
    config = hf_linattn.LinAttnBertConfig(**{**BERT.config().to_dict(), "linear_attention": older})
    hf_linattn.LinAttnBertForMaskedLM(config).save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config.linear_attention["num_features"] == 256
    layers = [module for module in loaded.modules() if isinstance(module, LinearAttention)]
    assert [layer.tensors()["projection"].shape[1] for layer in layers] == [256, 256]


@pytest.mark.parametrize("form", ["favor_plus", {"kind": "favor_plus", "num_features": 7}, "object"])
def test_forms_of_linear_attention(form: Any, stock: Path) -> None:
    form = hf_linattn.FavorPlusConfig(num_features=7) if form == "object" else form
    model = hf_linattn.LinAttnBertForMaskedLM.from_pretrained(stock, linear_attention=form)
    values = model.config.linear_attention
    assert values["kind"] == "favor_plus"
    assert values["version"] == 1
    assert values["num_features"] == (64 if form == "favor_plus" else 7)
    assert values["layers"] == [0, 1]
    assert values["attention_dropout"] == 0.1
    assert model.config.attention_probs_dropout_prob == 0
    config = hf_linattn.LinAttnBertConfig.from_pretrained(stock, linear_attention=form)
    again = hf_linattn.LinAttnBertForMaskedLM.from_pretrained(stock, config=config)
    assert torch.equal(logits(again, **BERT.inputs()), logits(model, **BERT.inputs()))


def test_from_config_and_direct_construction(converted: Path) -> None:
    config = hf_linattn.LinAttnBertConfig.from_pretrained(converted)
    expected = AutoModelForMaskedLM.from_pretrained(converted).state_dict()
    direct = hf_linattn.LinAttnBertForMaskedLM(config)
    by_auto = AutoModelForMaskedLM.from_config(config, dtype=torch.bfloat16)
    with torch.device("meta"):
        on_meta = hf_linattn.LinAttnBertForMaskedLM(config)
    on_meta.to_empty(device="cpu")
    for module in on_meta.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    on_meta.initialize_weights()
    for model in (direct, by_auto, on_meta):
        state = model.state_dict()
        for name in expected:
            if "linattn" in name:
                assert state[name].dtype == torch.float32
                assert torch.equal(state[name], expected[name]), name


@pytest.mark.compat("save and load")
def test_base_model_and_heads_load_each_other(converted: Path, tmp_path: Path) -> None:
    full = AutoModelForMaskedLM.from_pretrained(converted)
    base = AutoModel.from_pretrained(converted)
    assert type(base) is hf_linattn.LinAttnBertModel
    states = full(**BERT.inputs(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(base(**BERT.inputs()).last_hidden_state, states)
    base.save_pretrained(tmp_path / "base")
    head = hf_linattn.LinAttnBertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(head.bert(**BERT.inputs()).last_hidden_state, states)


@pytest.mark.compat("save and load")
def test_casts_keep_the_buffers(converted: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(converted)
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if "linattn" in name}
    assert before
    for cast in (model.bfloat16, model.half, model.float, lambda: model.to(torch.float16)):
        cast()
        for name, tensor in before.items():
            assert torch.equal(model.get_buffer(name), tensor), name


def test_stock_checkpoint_needs_linear_attention(stock: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs it: from_pretrained\(\.\.\., linear_attention=kind\)"):
        hf_linattn.LinAttnBertForMaskedLM.from_pretrained(stock)
    with pytest.raises(CheckpointError, match="linear_attention=kind"):
        hf_linattn.LinAttnBertForMaskedLM(BERT.config())


@pytest.mark.parametrize("kind", ["eva", "lara"])
def test_a_kind_without_tensors(kind: str, tmp_path: Path) -> None:
    """With proposal_map="none" there is nothing to save, and nothing missing on loading."""
    settings = BERT.settings(kind, proposal_map="none")
    model = hf_linattn.convert(BERT.build(), settings)
    assert not any("linattn" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(AutoModelForMaskedLM.from_pretrained(tmp_path), **BERT.inputs()), logits(model, **BERT.inputs())
    )
    for changes in ({"proposal_map": "residual"}, {"layers": [0]}, {"seed": 1}):
        values = {**settings.to_dict(), **changes}
        with pytest.raises(CheckpointError, match=r"contradict `linear_attention`"):
            AutoModelForMaskedLM.from_pretrained(tmp_path, linear_attention=values)


def test_attention_dropout_is_remembered() -> None:
    """Through a second assignment, which reads a config whose dropout is 0 already."""
    config = hf_linattn.LinAttnBertConfig(linear_attention="favor_plus")
    config.linear_attention = hf_linattn.EvaConfig()
    assert config.linear_attention["attention_dropout"] == 0.1
    config.attention_probs_dropout_prob = 0.3
    config.linear_attention = "lara"
    assert config.linear_attention["attention_dropout"] == 0.3
    assert config.attention_probs_dropout_prob == 0


@pytest.mark.parametrize("source", ["converted", "loaded"])
@pytest.mark.parametrize("kind", ["favor_sharp", "eva"])
def test_parts_of_a_composite_keep_their_kind_and_state(kind: str, source: str, tmp_path: Path) -> None:
    encoder = hf_linattn.convert(BY_NAME["bert-classifier"].build(), "favor_plus").bert
    decoder = hf_linattn.convert(GPT2.build(add_cross_attention=True), GPT2.settings(kind))
    with torch.no_grad():
        for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
            if "linattn" in name:
                tensor.add_(0.125)  # as after training and calibration
    if source == "loaded":
        decoder.save_pretrained(tmp_path / "decoder")
        decoder = GPT2.auto.from_pretrained(tmp_path / "decoder")
    state = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    assert any("linattn" in name for name in state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.decoder.state_dict().items())
    inputs = {**BERT.inputs(), "decoder_input_ids": GPT2.inputs()["input_ids"]}
    expected = logits(model, **inputs)
    model.save_pretrained(tmp_path)
    loaded = EncoderDecoderModel.from_pretrained(tmp_path)
    assert loaded.encoder.config._attn_implementation == "favor_plus"
    assert loaded.decoder.config._attn_implementation == kind
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.decoder.state_dict().items())
    assert largest(logits(loaded, **inputs) - expected) < 1e-5
    for wanted in ("sdpa", {"decoder": "eager"}, {"encoder": "lara"}):
        with pytest.raises(ConfigError, match=r"as `linear_attention` says"):
            EncoderDecoderModel.from_pretrained(tmp_path, attn_implementation=wanted)
    loaded.set_attn_implementation("sdpa")
    assert loaded.encoder.config._attn_implementation == "sdpa"
