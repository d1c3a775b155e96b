"""SentenceTransformer round a converted model: encode, train, save, load, adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, KINDS, bert_config
from transformers import BertModel
from wrapped import lora, sentences

import hf_linattn
from hf_linattn.training import LinAttnCallback, redraw_projections

library = pytest.importorskip("sentence_transformers")
TEXTS = [" ".join(f"w{3 + (7 * i * j) % 50}" for j in range(1, length)) for i, length in ((1, 40), (2, 12), (3, 28))]


def converted(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return hf_linattn.convert(BertModel(bert_config()), BERT.settings(kind, **changes)).eval()


def alone(model: Any, outer: Any, text: str) -> torch.Tensor:
    """A text's embedding from the model itself: the mean of its tokens, without padding."""
    inputs = outer.tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).last_hidden_state.mean(1)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model = converted(kind)
    outer = sentences(model, tmp_path)
    found = outer.encode(TEXTS, batch_size=3, convert_to_tensor=True)
    for text, embedding in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(embedding, alone(model, outer, text), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    outer = sentences(converted(kind), tmp_path)
    outer.save(str(tmp_path / "saved"))
    loaded = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert type(loaded[0].model).__name__ == "LinAttnBertModel"
    torch.testing.assert_close(
        loaded.encode(TEXTS, convert_to_tensor=True), outer.encode(TEXTS, convert_to_tensor=True), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_converted_in_place(kind: str, tmp_path: Path) -> None:
    """The attribute that `convert` names is the one to convert: the outer model follows."""
    torch.manual_seed(0)
    outer = sentences(BertModel(bert_config()).eval(), tmp_path)
    softmax = outer.encode(TEXTS, convert_to_tensor=True)
    with pytest.raises(hf_linattn.UnsupportedError, match=r"Pass what is inside, model\[0\]\.model "):
        hf_linattn.convert(outer, kind)
    hf_linattn.convert(outer[0].model, BERT.settings(kind))
    linear = outer.encode(TEXTS, convert_to_tensor=True)
    assert not torch.allclose(softmax, linear, atol=1e-4)
    outer.save(str(tmp_path / "saved"))
    loaded = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(loaded.encode(TEXTS, convert_to_tensor=True), linear, rtol=0, atol=1e-5)
    hf_linattn.revert(outer[0].model)
    torch.testing.assert_close(outer.encode(TEXTS, convert_to_tensor=True), softmax, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    model = converted(kind, **({"redraw_interval": 1} if kind.startswith("favor") else {}))
    before = copy.deepcopy(model.state_dict())
    outer = sentences(model, tmp_path)
    data = datasets.Dataset.from_dict({"anchor": TEXTS[:2] * 2, "positive": TEXTS[1:] * 2})
    arguments = library.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True
    )
    library.SentenceTransformerTrainer(
        model=outer,
        args=arguments,
        train_dataset=data,
        loss=pytest.importorskip("sentence_transformers.losses").MultipleNegativesRankingLoss(outer),
        callbacks=[LinAttnCallback()],
    ).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "encoder.layer.0.attention.self.query.weight" in changed
    learned = {name for name, _ in model.named_parameters()}
    ours = {name for name in before if ".linattn." in name and (name in learned or kind.startswith("favor"))}
    assert ours <= changed or kind == "lara"  # a map of LARA may have no gradient in a text of one window
    embedding = outer.encode(TEXTS[:1], convert_to_tensor=True)[0]
    torch.testing.assert_close(embedding, alone(model.eval(), outer, TEXTS[0]), rtol=0, atol=1e-5)


def test_an_adapter_inside(tmp_path: Path) -> None:
    outer = sentences(converted("favor_plus", redraw_interval=10), tmp_path)
    outer[0].model = lora(outer[0].model)
    assert redraw_projections(outer, 25) == 2
    want = outer.encode(TEXTS, convert_to_tensor=True)
    outer[0].model.save_pretrained(tmp_path / "adapter")
    peft = pytest.importorskip("peft")
    again = sentences(converted("favor_plus", redraw_interval=10), tmp_path)
    again[0].model = peft.PeftModel.from_pretrained(again[0].model, tmp_path / "adapter").eval()
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), want, rtol=0, atol=1e-6)
