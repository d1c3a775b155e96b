"""Another vocabulary: the embeddings change, the attention does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import VOCAB, logits
from heads import TEXT, Stock, build, convert, every_class, every_class_and_family, inputs
from transformers import BertForMaskedLM, GPT2LMHeadModel, ViTModel

from hf_linattn.models import COUNTERPARTS


def attention_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "linattn" in name}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@every_class_and_family(TEXT)
def test_resized_token_embeddings(stock: Stock, kind: str, tied: bool, tmp_path: Path) -> None:
    """More, fewer, a multiple: config, embeddings and output follow; old rows stay; saved and loaded so."""
    model = convert(stock, kind, tie_word_embeddings=tied)
    before, states = model.get_input_embeddings().weight.clone(), attention_state(model)
    assert model.resize_token_embeddings(VOCAB).weight.shape[0] == VOCAB
    for count in (VOCAB + 10, VOCAB - 5):
        table = model.resize_token_embeddings(count)
        assert model.config.vocab_size == table.weight.shape[0] == count
        kept = min(count, VOCAB - 5)
        assert torch.equal(table.weight[:kept], before[:kept])
        batch = inputs(stock)
        batch["input_ids"] = batch["input_ids"].clamp(max=count - 1)
        assert torch.isfinite(logits(model, **batch)).all()
        output = model.get_output_embeddings()
        if output is not None:
            assert output.weight.shape[0] == count
            assert (output.weight is table.weight) == tied
    assert model.resize_token_embeddings(VOCAB, pad_to_multiple_of=32).weight.shape[0] == 64
    assert all(torch.equal(tensor, states[name]) for name, tensor in attention_state(model).items())
    model.save_pretrained(tmp_path)
    loaded = COUNTERPARTS[stock].from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, **inputs(stock)), logits(model, **inputs(stock)))


@every_class()
def test_embeddings_can_be_replaced(stock: Stock) -> None:
    model = convert(stock, "favor_plus")
    found = model.get_input_embeddings()
    assert isinstance(found, torch.nn.Module)
    other = torch.nn.Embedding(10, 32)
    model.set_input_embeddings(other)
    if stock in TEXT:
        assert model.get_input_embeddings() is other
    output = model.get_output_embeddings()
    assert output is None or isinstance(output, torch.nn.Linear)


@pytest.mark.parametrize("stock", [BertForMaskedLM, GPT2LMHeadModel, ViTModel], ids=lambda cls: cls.__name__)
def test_positions_are_resized_by_our_own_function(stock: Stock) -> None:
    """The stock classes only name the method, and so do the converted ones: `extend_positions` does it."""
    for model in (convert(stock, "favor_plus"), build(stock)):
        with pytest.raises(NotImplementedError, match="resize_position_embeddings"):
            model.resize_position_embeddings(128)
