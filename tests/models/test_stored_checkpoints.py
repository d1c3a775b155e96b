"""Checkpoints that an earlier version has saved (`tests/checkpoints`) load, compute the same, are saved as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedLM

import hf_linattn

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
AUTO = {"bert": AutoModelForMaskedLM, "gpt2": AutoModelForCausalLM, "vit": AutoModelForImageClassification}
FOLDERS = [f"{kind}_{family}" for kind in ("eva", "favor_plus", "favor_sharp", "lara") for family in AUTO]


def load(folder: Path, family: str) -> Any:
    return AUTO[family].from_pretrained(folder).eval()


@pytest.mark.compat("save and load")
@pytest.mark.parametrize("name", FOLDERS)
def test_logits_of_a_stored_checkpoint(name: str) -> None:
    kind, _, family = name.rpartition("_")
    given = load_file(CHECKPOINTS / name / "expected.safetensors")
    expected = given.pop("logits")
    model = load(CHECKPOINTS / name, family)
    assert model.config._attn_implementation == kind
    assert type(model) is getattr(hf_linattn, model.config.architectures[0])
    with torch.no_grad():
        logits = model(**given).logits
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.compat("save and load")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_stored_checkpoint_saved_again(name: str, tmp_path: Path) -> None:
    """The same settings, tensors and file names."""
    family = name.rpartition("_")[2]
    load(CHECKPOINTS / name, family).save_pretrained(tmp_path / "once")
    load(tmp_path / "once", family).save_pretrained(tmp_path / "twice")
    before, once, twice = (
        json.loads((folder / "config.json").read_text())
        for folder in (CHECKPOINTS / name, tmp_path / "once", tmp_path / "twice")
    )
    assert once == twice
    for field in ("linear_attention", "architectures", "model_type"):
        assert once[field] == before[field]
    if before["transformers_version"] == transformers.__version__:  # others may add fields of their own
        assert once == before
    tensors = load_file(CHECKPOINTS / name / "model.safetensors")
    again = load_file(tmp_path / "twice" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(again[key], tensor), key
