"""Weights that are shared between embeddings and output stay so; those of the attention are shared with nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import logits
from heads import TEXT, Stock, build, convert, every_class_and_family, inputs, settings
from safetensors import safe_open

import hf_linattn
from hf_linattn.models import COUNTERPARTS

TIED = [cls for cls in TEXT if cls.__name__.endswith(("PreTraining", "LMHeadModel", "MaskedLM", "DoubleHeadsModel"))]


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def shared(model: Any) -> set[str]:
    """Names of the state dict whose memory another name has too."""
    places: dict[tuple[int, int], list[str]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel():
            places.setdefault((tensor.data_ptr(), tensor.numel()), []).append(name)
    return {name for names in places.values() if len(names) > 1 for name in names}


@every_class_and_family(TIED)
def test_tied_embeddings(stock: Stock, kind: str, tmp_path: Path) -> None:
    """After conversion, saving (once), loading, reverting; and one follows the other."""
    expected = shared(build(stock))
    model = convert(stock, kind)
    assert expected
    assert shared(model) == expected
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(expected & set(file.keys())) == len(expected) // 2
    loaded = COUNTERPARTS[stock].from_pretrained(tmp_path)
    for one in (model, loaded):
        assert is_tied(one)
        with torch.no_grad():
            one.get_input_embeddings().weight.mul_(2)
        assert is_tied(one)
    assert torch.equal(logits(loaded, **inputs(stock)), logits(model, **inputs(stock)))
    assert is_tied(hf_linattn.revert(model))
    assert shared(model) == expected


@every_class_and_family(TIED)
def test_untied_embeddings(stock: Stock, kind: str, tmp_path: Path) -> None:
    model = convert(stock, kind, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    assert not shared(model)
    model.save_pretrained(tmp_path)
    loaded, info = COUNTERPARTS[stock].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not is_tied(loaded)
    assert torch.equal(logits(loaded, **inputs(stock)), logits(model, **inputs(stock)))


@every_class_and_family()
def test_layers_share_nothing(stock: Stock, kind: str) -> None:
    """Also layers of one seed: training or calibrating one leaves the others alone."""
    model = hf_linattn.convert(build(stock), settings(stock, kind))
    assert not [name for name in shared(model) if "linattn" in name]


def test_every_tied_class_is_here() -> None:
    assert {cls for cls in TEXT if shared(build(cls))} == set(TIED)


@pytest.mark.parametrize("tied", [True, False])
def test_names_of_tied_weights_exist(tied: bool) -> None:
    for stock in TIED:
        model = convert(stock, "favor_plus", tie_word_embeddings=tied)
        assert set(model.all_tied_weights_keys) <= set(model.state_dict())
        assert bool(model.all_tied_weights_keys) == tied
