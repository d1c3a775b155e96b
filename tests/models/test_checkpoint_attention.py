"""A checkpoint computes what its settings say: what would make it softmax, or another kind, is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import BERT, GPT2, VIT, ModelCase, largest, logits, matrix, ready
from helpers import edit_config
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertTokenizer, pipeline

import hf_linattn
from hf_linattn.errors import CheckpointError, ConfigError

OTHERS = ["sdpa", "eager", "flex_attention", "eva", {"": "sdpa"}]
BY_ARGUMENT = {
    "Auto class": lambda folder, wanted: AutoModelForMaskedLM.from_pretrained(folder, attn_implementation=wanted),
    "base model": lambda folder, wanted: AutoModel.from_pretrained(folder, attn_implementation=wanted),
    "class": lambda folder, wanted: hf_linattn.LinAttnBertModel.from_pretrained(folder, attn_implementation=wanted),
    "AutoConfig": lambda folder, wanted: AutoConfig.from_pretrained(folder, attn_implementation=wanted),
    "config": lambda _, wanted: hf_linattn.LinAttnBertConfig(attn_implementation=wanted, linear_attention="lara"),
    "stock": lambda folder, wanted: hf_linattn.LinAttnBertModel.from_pretrained(
        folder.parent / "stock", linear_attention="favor_plus", attn_implementation=wanted
    ),
    "from_config": lambda folder, wanted: AutoModelForMaskedLM.from_config(
        AutoConfig.from_pretrained(folder), attn_implementation=wanted
    ),
    "pipeline": lambda folder, wanted: pipeline(
        "feature-extraction",
        model=str(folder),
        tokenizer=BertTokenizer(vocab={"[UNK]": 0}),
        model_kwargs={"attn_implementation": wanted},
    ),
}


@pytest.mark.parametrize("wanted", OTHERS, ids=str)
@pytest.mark.parametrize("road", BY_ARGUMENT)
def test_another_attention_by_argument(road: str, wanted: Any, converted: Path, stock: Path) -> None:
    with pytest.raises((ConfigError, ValueError), match=r"as `linear_attention` says[\s\S]*revert\(model\)"):
        BY_ARGUMENT[road](converted, wanted)


@pytest.mark.parametrize("wanted", OTHERS, ids=str)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_another_attention_in_the_config(key: str, wanted: Any, converted: Path) -> None:
    edit_config(converted, **{key: wanted})
    for load in (AutoConfig, AutoModel, AutoModelForMaskedLM, hf_linattn.LinAttnBertForMaskedLM):
        with pytest.raises(ConfigError, match=r"got '[a-z_]+' \(an argument, or a key of config.json\)"):
            load.from_pretrained(converted)


@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2, VIT))
@pytest.mark.parametrize("active", ["eager", "sdpa"])
def test_saved_while_softmax_is_looked_at(active: str, kind: str, case: ModelCase, tmp_path: Path) -> None:
    """`set_attn_implementation` is for the moment; what is saved computes what its settings say."""
    model = ready(hf_linattn.convert(case.build(), case.settings(kind), layers=[0]))
    expected = logits(model, **case.inputs())
    model.set_attn_implementation(active)
    assert largest(logits(model, **case.inputs()) - expected) > 1e-4
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    loaded = case.auto.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == kind
    assert largest(logits(loaded, **case.inputs()) - expected) < 1e-5
    with pytest.raises(ConfigError, match="as `linear_attention` says"):
        type(model)(model.config)
    model.set_attn_implementation(kind)
    assert largest(logits(model, **case.inputs()) - expected) < 1e-5


def test_the_own_kind_may_be_named(converted: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(converted, attn_implementation="favor_plus")
    edit_config(converted, attn_implementation="favor_plus", _attn_implementation_internal="sdpa")
    for found in (model, AutoModelForMaskedLM.from_pretrained(converted)):
        assert found.config._attn_implementation == "favor_plus"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "layers must be integers from 0 to 0; got 1"),
        ({"model_type": "linattn_gpt2"}, "contradict `linear_attention`"),
        ({"linear_attention": "favor_plus"}, "contradict `linear_attention`"),
        ({"linear_attention": {"kind": "softmax"}}, "Unknown attention kind 'softmax'"),
        ({"linear_attention": {"kind": "favor_plus", "layers": []}}, "at least one layer"),
        ({"linear_attention": {"kind": "favor_plus", "enabled": False}}, "has no field 'enabled'"),
        ({"linear_attention": False}, "must be the name of a kind"),
    ],
    ids=str,
)
def test_an_edit_that_would_take_attention_away(changes: dict[str, Any], message: str, converted: Path) -> None:
    edit_config(converted, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        AutoModel.from_pretrained(converted)


@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2, VIT))
def test_a_class_that_would_be_softmax_is_refused(kind: str, case: ModelCase, tmp_path: Path) -> None:
    """The stock class, its config, or its name in config.json."""
    ready(hf_linattn.convert(case.build(), case.settings(kind))).save_pretrained(tmp_path)
    stock = case.stock
    with pytest.raises(CheckpointError, match=f"would compute softmax.*linattn_{stock.config_class.model_type}"):
        stock.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="would compute softmax"):
        case.auto.from_pretrained(tmp_path, config=stock.config_class.from_pretrained(tmp_path))
    edit_config(tmp_path, model_type=stock.config_class.model_type)
    with pytest.raises(CheckpointError, match="would compute softmax"):
        case.auto.from_pretrained(tmp_path)
