"""Checkpoints that are damaged, of a newer version, or contradict their own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import BERT
from helpers import edit_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

import hf_linattn
from hf_linattn.errors import CheckpointError, ConfigError


# -- damaged and contradictory checkpoints --------------------------------------------------------------------------
def test_checkpoint_with_a_missing_field(converted: Path) -> None:
    edit_config(converted, linear_attention=None)
    with pytest.raises(CheckpointError, match=r"has no `linear_attention`.*damaged"):
        AutoModelForMaskedLM.from_pretrained(converted)


def test_checkpoint_of_a_newer_version(converted: Path) -> None:
    values = json.loads((converted / "config.json").read_text())["linear_attention"]
    edit_config(converted, linear_attention={**values, "version": 2})
    with pytest.raises(CheckpointError, match=r"version'\] is 2.*up to 1.*[Uu]pgrade"):
        AutoModelForMaskedLM.from_pretrained(converted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [0]}, "unexpected .*layer.1.*linattn"),
        ({"num_features": 16}, "of another shape .*linattn.projection"),
        ({"kind": "eva"}, "EvaConfig has no field '.*'; fields: "),
    ],
)
def test_field_contradicts_the_weights(change: dict[str, Any], message: str, converted: Path) -> None:
    values = json.loads((converted / "config.json").read_text())["linear_attention"]
    edit_config(converted, linear_attention={**values, **change})
    with pytest.raises((CheckpointError, ConfigError), match=message):
        AutoModelForMaskedLM.from_pretrained(converted)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        AutoModelForMaskedLM.from_pretrained(converted, ignore_mismatched_sizes=True)


def test_another_kind_than_the_weights(converted: Path) -> None:
    with pytest.raises(CheckpointError, match=r"contradict `linear_attention`.*revert the model"):
        AutoModelForMaskedLM.from_pretrained(converted, linear_attention="lara")


RELU = BERT.settings("favor_plus", kernel="relu", window_size=0)
T5 = BERT.settings("eva", relative_position="t5")


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        (BERT.settings("favor_plus"), BERT.settings("favor_sharp"), "kind 'favor_plus' in config.json"),
        (BERT.settings("favor_plus"), BERT.settings("favor_plus", seed=3), "seed 0 in config.json"),
        (BERT.settings("lara", window_size=0), BERT.settings("eva"), "kind 'lara' in config.json"),
        (RELU, RELU.replace(kernel="exp"), "kernel 'relu' in config.json"),
        (T5, T5.replace(relative_index="published"), "relative_index 'corrected' in config.json"),
    ],
    ids=["kind", "seed", "lara-eva", "kernel", "relative-index"],
)
def test_tensors_that_fit_by_chance(saved: Any, asked: Any, message: str, tmp_path: Path) -> None:
    hf_linattn.convert(BERT.build(), saved).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"contradict `linear_attention`.*{message}"):
        AutoModelForMaskedLM.from_pretrained(tmp_path, linear_attention=asked)
    # No tensor depends on these (a table of relative positions does on the window).
    window = saved.window_size if saved == T5 else 2 * saved.window_size
    changed = saved.replace(window_size=window, slot_dropout=0.25)
    values = AutoModelForMaskedLM.from_pretrained(tmp_path, linear_attention=changed).config.linear_attention
    assert (values["window_size"], values["slot_dropout"]) == (changed.window_size, 0.25)
    assert values["attention_dropout"] == 0.1


@pytest.mark.parametrize("dropped", ["all", "one"])
def test_weights_without_linear_attention(dropped: str, converted: Path) -> None:
    path = converted / "model.safetensors"
    state = load_file(path)
    names = sorted(name for name in state if "linattn" in name)
    for name in names if dropped == "all" else names[:1]:
        del state[name]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="incomplete" if dropped == "all" else "contradict.*missing"):
        AutoModelForMaskedLM.from_pretrained(converted)


def test_mismatched_sizes_elsewhere_keep_their_meaning(converted: Path) -> None:
    edit_config(converted, vocab_size=61)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes=True"):
        AutoModelForMaskedLM.from_pretrained(converted)
    model, info = AutoModelForMaskedLM.from_pretrained(
        converted, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.config.vocab_size == 61
    assert info["mismatched_keys"]
