"""Saving and loading: every class, whole, in part, and where shapes differ."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KINDS, largest, logits
from heads import CLASSES, Stock, case_of, convert, every_class_and_family, every_kind, inputs
from safetensors import safe_open
from transformers import BertForSequenceClassification, GPT2ForSequenceClassification, ViTForImageClassification

from hf_linattn.models import COUNTERPARTS

HEADS = [cls for cls in CLASSES if not cls.__name__.endswith(("BertModel", "GPT2Model", "ViTModel"))]
CLASSIFIERS = [BertForSequenceClassification, GPT2ForSequenceClassification, ViTForImageClassification]


def outputs(model: Any, stock: Stock) -> torch.Tensor:
    return logits(model, **inputs(stock))


@every_class_and_family()
def test_save_and_load(stock: Stock, kind: str, tmp_path: Path) -> None:
    """One safetensors file, each tensor once, nothing missing or left over, the same outputs; and so once more."""
    model = convert(stock, kind)
    expected = outputs(model, stock)
    for folder in (tmp_path / "one", tmp_path / "two"):
        model.save_pretrained(folder)
        assert {"config.json", "model.safetensors"} <= set(os.listdir(folder))
        assert not [name for name in os.listdir(folder) if name.endswith((".bin", ".pt"))]
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            saved = set(file.keys())
        tied = set(model.all_tied_weights_keys)
        assert saved | tied == set(model.state_dict()) | tied
        model, info = COUNTERPARTS[stock].from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert not model.training
        assert torch.equal(outputs(model, stock), expected)


@every_class_and_family()
def test_state_dict_into_a_fresh_model(stock: Stock, kind: str) -> None:
    """A state dict goes into a fresh model, and a deep copy is independent."""
    model = convert(stock, kind)
    expected = outputs(model, stock)
    fresh = COUNTERPARTS[stock](copy.deepcopy(model.config)).eval()
    assert (
        fresh.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}).missing_keys == []
    )
    assert torch.equal(outputs(fresh, stock), expected)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(outputs(copied, stock), expected)


@every_kind
@pytest.mark.parametrize("stock", CLASSIFIERS, ids=lambda cls: cls.__name__)
def test_without_a_checkpoint(stock: Stock, kind: str) -> None:
    model = convert(stock, kind)
    loaded = COUNTERPARTS[stock].from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(outputs(loaded, stock), outputs(model, stock))


@every_class_and_family(HEADS)
def test_a_base_model_in_a_head(stock: Stock, kind: str, tmp_path: Path) -> None:
    """The head's own weights are missing and named, those of the attention are not; and a head's base loads alone."""
    model = convert(stock, kind)
    model.base_model.save_pretrained(tmp_path)
    loaded, info = COUNTERPARTS[stock].from_pretrained(tmp_path, output_loading_info=True)
    assert not any("linattn" in name for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    base = {name: tensor for name, tensor in loaded.base_model.state_dict().items() if "linattn" in name}
    assert base
    assert all(torch.equal(tensor, model.base_model.state_dict()[name]) for name, tensor in base.items())


@every_kind
@pytest.mark.parametrize("stock", CLASSIFIERS, ids=lambda cls: cls.__name__)
def test_a_head_of_another_size(stock: Stock, kind: str, tmp_path: Path) -> None:
    model = convert(stock, kind)
    model.save_pretrained(tmp_path)
    cls = COUNTERPARTS[stock]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes=True"):
        cls.from_pretrained(tmp_path, num_labels=42)
    loaded, info = cls.from_pretrained(tmp_path, num_labels=42, ignore_mismatched_sizes=True, output_loading_info=True)
    names = {name for name, *_ in info["mismatched_keys"]}
    assert names
    assert all(torch.isfinite(tensor).all() for tensor in loaded.state_dict().values() if tensor.is_floating_point())
    for name, tensor in loaded.state_dict().items():
        if name not in names:
            assert torch.equal(tensor, model.state_dict()[name]), name
    assert outputs(loaded, stock).shape[-1] == 42


@every_kind
@pytest.mark.parametrize("stock", CLASSIFIERS, ids=lambda cls: cls.__name__)
def test_weights_that_are_not_contiguous(stock: Stock, kind: str, tmp_path: Path) -> None:
    model = convert(stock, kind)
    expected = outputs(model, stock)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.t().contiguous().t()
    model.save_pretrained(tmp_path)
    loaded = COUNTERPARTS[stock].from_pretrained(tmp_path)
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    assert largest(outputs(loaded, stock) - expected) < 1e-5


@every_kind
@pytest.mark.parametrize("stock", CLASSIFIERS, ids=lambda cls: cls.__name__)
def test_dtypes_and_devices(stock: Stock, kind: str, tmp_path: Path) -> None:
    """A dtype asked for reaches weights and config, not the buffers; Transformers refuses the meta device."""
    convert(stock, kind).save_pretrained(tmp_path)
    cls = COUNTERPARTS[stock]
    model = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.config.dtype == model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for n, b in model.named_buffers() if "linattn" in n and b.is_floating_point()} <= {torch.float32}
    for context in (torch.device("cpu"), torch.device("meta")):
        with context:
            if context.type == "meta":
                with pytest.raises(RuntimeError, match="meta"):
                    cls.from_pretrained(tmp_path)
            else:
                assert not any(p.is_meta for p in cls.from_pretrained(tmp_path).parameters())


def test_keys_to_ignore_when_saving(tmp_path: Path) -> None:
    stock = BertForSequenceClassification
    for kind in KINDS:
        model = convert(stock, kind)
        model._keys_to_ignore_on_save = ["classifier.bias"]
        model.save_pretrained(tmp_path / kind)
        with safe_open(tmp_path / kind / "model.safetensors", "pt") as file:
            assert "classifier.bias" not in file.keys()  # noqa: SIM118
        again = COUNTERPARTS[stock].from_pretrained(tmp_path / kind)
        assert largest(again.classifier.bias) == 0
    assert case_of(stock)
