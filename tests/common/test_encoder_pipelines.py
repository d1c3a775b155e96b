"""Pipelines around converted encoders and images: one after the other or in batches, and after loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KINDS, VOCAB
from heads import convert, every_kind
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)

TEXTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20"]
TASKS = {
    "fill-mask": BertForMaskedLM,
    "text-classification": BertForSequenceClassification,
    "token-classification": BertForTokenClassification,
    "feature-extraction": BertModel,
}


def tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    words = [*special.values(), "[UNK]", *(f"w{index}" for index in range(5, VOCAB))]
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", model_max_length=64, **special)


def numbers(found: Any) -> list[float]:
    """All numbers in a result, in order."""
    if isinstance(found, dict):
        return [number for value in found.values() for number in numbers(value)]
    if isinstance(found, (list, tuple)):
        return [number for value in found for number in numbers(value)]
    return [float(found)] if isinstance(found, (int, float)) or hasattr(found, "__float__") else []


@every_kind
@pytest.mark.parametrize("task", TASKS)
def test_text_pipelines(task: str, kind: str, tmp_path: Path) -> None:
    model, texts = convert(TASKS[task], kind), TEXTS
    if task == "fill-mask":
        texts = [f"{text} [MASK]" for text in texts]
    run = pipeline(task, model=model, tokenizer=tokenizer(), device="cpu")
    alone = [run(text) for text in texts]
    assert numbers(alone)
    assert numbers(run(texts, batch_size=1)) == pytest.approx(numbers(alone), abs=1e-5)
    if task != "feature-extraction":  # there a batch comes with its padding
        assert numbers(run(texts, batch_size=3)) == pytest.approx(numbers(alone), abs=1e-4)
    run.save_pretrained(tmp_path)
    loaded = pipeline(task, model=str(tmp_path), device="cpu")
    assert loaded.model.config._attn_implementation == kind
    assert numbers([loaded(text) for text in texts]) == pytest.approx(numbers(alone), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_shot(kind: str) -> None:
    """Several labels for a text, in one batch."""
    names = {0: "contradiction", 1: "entailment"}
    model = convert(BertForSequenceClassification, kind, id2label=names, label2id={v: k for k, v in names.items()})
    words = tokenizer()
    words.truncation_side = "right"
    run = pipeline("zero-shot-classification", model=model, tokenizer=words, device="cpu")
    found = run(TEXTS[0], candidate_labels=["w30", "w31", "w32"], hypothesis_template="{}")
    assert sorted(found["labels"]) == ["w30", "w31", "w32"]
    assert torch.tensor(found["scores"]).sum() == pytest.approx(1.0, abs=1e-5)
