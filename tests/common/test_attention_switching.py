"""From a linear kind to softmax and back while the model lives, and at loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import BERT, largest, logits
from heads import CLASSES, Stock, build, convert, every_class_and_family, every_kind, inputs

from hf_linattn.errors import ConfigError
from hf_linattn.models import COUNTERPARTS

SOFTMAX = ("eager", "sdpa")


@every_class_and_family()
def test_to_softmax_and_back(stock: Stock, kind: str) -> None:
    """Switched to softmax it is the stock model, in both implementations; switched back it is what it was."""
    expected = logits(build(stock), **inputs(stock))
    model = convert(stock, kind)
    linear = logits(model, **inputs(stock))
    for name in (*SOFTMAX, *SOFTMAX):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        assert largest(logits(model, **inputs(stock)) - expected) < 1e-4
    model.set_attn_implementation(kind)
    assert torch.equal(logits(model, **inputs(stock)), linear)


@every_class_and_family()
def test_attention_weights_of_softmax(stock: Stock, kind: str) -> None:
    """A linear kind has none (refused, see test_bad_input); eager attention has."""
    model = convert(stock, kind)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**inputs(stock), output_attentions=True).attentions
    assert len(found) == 2
    assert all(largest(weights.sum(-1) - 1) < 1e-4 for weights in found)


@every_kind
@pytest.mark.parametrize("name", SOFTMAX)
def test_loaded_with_softmax(kind: str, name: str, tmp_path: Path) -> None:
    """An argument that would make the checkpoint softmax is refused; a loaded model can be switched, and back."""
    for stock in (CLASSES[0], BERT.stock):
        model = convert(stock, kind)
        model.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=f"got '{name}'"):
            COUNTERPARTS[stock].from_pretrained(tmp_path, attn_implementation=name)
        loaded = COUNTERPARTS[stock].from_pretrained(tmp_path).eval()
        loaded.set_attn_implementation(name)
        assert loaded.config._attn_implementation == name
        assert largest(logits(loaded, **inputs(stock)) - logits(build(stock), **inputs(stock))) < 1e-4
        loaded.set_attn_implementation(kind)
        assert torch.equal(logits(loaded, **inputs(stock)), logits(model, **inputs(stock)))


@every_kind
def test_a_name_that_does_not_exist(kind: str) -> None:
    model = convert(BERT.stock, kind)
    with pytest.raises(ValueError, match="no_such_attention"):
        model.set_attn_implementation("no_such_attention")
    assert model.config._attn_implementation == kind
