"""Configs of converted models: everything that a config of Transformers can be turned into and made from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KINDS
from heads import FAMILIES
from transformers import AutoConfig

from hf_linattn.models import CONFIGS

BOTH = [pytest.param(family, kind, id=f"{family}-{kind}") for family in CONFIGS for kind in KINDS]
config_of = pytest.mark.parametrize(("family", "kind"), BOTH)


def make(family: str, kind: str, **changes: Any) -> Any:
    values = {**FAMILIES[family].config(**changes).to_dict(), "linear_attention": FAMILIES[family].settings(kind)}
    values.pop("model_type")
    return CONFIGS[family](**values)


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    ours, theirs = one.to_dict(), other.to_dict()
    for values in (ours, theirs):
        values.pop("_name_or_path", None)  # where it was read from
    assert ours == theirs
    assert one.linear_attention == other.linear_attention
    assert one._attn_implementation == other._attn_implementation


@config_of
def test_forms_of_a_config(family: str, kind: str, tmp_path: Path) -> None:
    """JSON text, JSON file, dictionary, folder, subfolder, copy: the same config, with its kind."""
    config, cls = make(family, kind), CONFIGS[family]
    assert config.to_json_string() == cls.from_dict(config.to_dict()).to_json_string()
    config.to_json_file(tmp_path / "one.json")
    same(cls.from_json_file(str(tmp_path / "one.json")), config)
    same(copy.deepcopy(config), config)
    config.save_pretrained(tmp_path / "top" / "below")
    same(cls.from_pretrained(tmp_path / "top" / "below"), config)
    same(cls.from_pretrained(tmp_path / "top", subfolder="below"), config)
    same(AutoConfig.from_pretrained(tmp_path / "top" / "below"), config)
    same(AutoConfig.for_model(**config.to_dict()), config)
    assert config.to_diff_dict()["linear_attention"] == config.linear_attention
    config.save_pretrained(tmp_path / "again")
    first, second = (tmp_path / name / "config.json" for name in ("top/below", "again"))
    assert first.read_text() == second.read_text()


@config_of
def test_common_attributes(family: str, kind: str) -> None:
    config = make(family, kind)
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        assert getattr(config, name) == getattr(FAMILIES[family].config(), name)
    for name in ("hidden_size", "num_attention_heads"):
        changed = copy.deepcopy(config)
        setattr(changed, name, 8)
        assert getattr(changed, name) == 8
    assert make(family, kind, num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.num_labels = 5
    assert (len(config.id2label), len(config.label2id)) == (5, 5)
    for name, value in {"output_hidden_states": True, "return_dict": False, "problem_type": "regression"}.items():
        assert getattr(make(family, kind, **{name: value}), name) == value
    assert make(family, kind, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("family", CONFIGS)
def test_without_arguments(family: str) -> None:
    config = CONFIGS[family]()
    assert config.linear_attention is None
    stock = FAMILIES[family].stock.config_class()
    ours, theirs = config.to_dict(), stock.to_dict()
    assert {key: value for key, value in ours.items() if key not in ("linear_attention", "model_type")} == {
        key: value for key, value in theirs.items() if key != "model_type"
    }


@config_of
def test_the_attention_of_a_config_can_be_set(family: str, kind: str) -> None:
    config = make(family, kind)
    config._attn_implementation = "eager"
    assert config._attn_implementation == "eager"
    assert copy.deepcopy(config)._attn_implementation == "eager"
    config._attn_implementation = kind
    assert config._attn_implementation == kind
