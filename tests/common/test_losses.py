"""Losses and gradients of every head: labels, keywords of losses, kinds of problems."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import KINDS, largest
from heads import DECODERS, WITH_LOSS, Stock, build, convert, every_class_and_family, every_kind, inputs, labels
from transformers import BertForSequenceClassification, GPT2ForSequenceClassification, ViTForImageClassification

IGNORED = -100


def learned(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@every_class_and_family(WITH_LOSS)
def test_parameters_with_a_gradient_are_those_of_the_stock_model(stock: Stock, kind: str) -> None:
    expected = build(stock).train()
    model = convert(stock, kind).train()
    for one in (expected, model):
        loss = one(**inputs(stock), **labels(stock)).loss
        assert loss.shape == ()
        assert torch.isfinite(loss)
        loss.backward()
    assert {name for name in learned(model) if "linattn" not in name} == learned(expected)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "linattn" in name)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_kind
@pytest.mark.parametrize("stock", DECODERS, ids=lambda cls: cls.__name__)
def test_keywords_of_the_loss(stock: Stock, kind: str) -> None:
    """What a Trainer and a collator give to the loss of a language model changes the loss and nothing else."""
    model, batch = convert(stock, kind), inputs(stock)
    ids = batch["input_ids"]
    with torch.no_grad():
        plain = model(**batch, labels=ids)
        divided = model(**batch, labels=ids, num_items_in_batch=torch.tensor(50))
        count = ids[:, 1:].numel()
        assert largest(divided.loss - plain.loss * count / 50) < 1e-5
        masked = ids.clone()
        masked[:, 10:] = IGNORED
        expected = torch.nn.functional.cross_entropy(plain.logits[:, :9].flatten(0, 1), ids[:, 1:10].flatten())
        assert largest(model(**batch, labels=masked).loss - expected) < 1e-5
        assert torch.equal(divided.logits, plain.logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "stock",
    [BertForSequenceClassification, GPT2ForSequenceClassification, ViTForImageClassification],
    ids=lambda cls: cls.__name__,
)
def test_kinds_of_problems(stock: Stock, kind: str) -> None:
    """Regression, one label and several, without a warning about shapes that do not match."""
    for problem, count, given in (
        ("regression", 1, torch.tensor([0.5, -1.0])),
        ("single_label_classification", 3, torch.tensor([2, 0])),
        ("multi_label_classification", 2, torch.tensor([[1.0, 0.0], [1.0, 1.0]])),
    ):
        model = convert(stock, kind, problem_type=problem, num_labels=count)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = model(**inputs(stock), labels=given)
        if problem == "regression":
            expected = torch.nn.functional.mse_loss(out.logits.squeeze(), given)
        elif problem == "single_label_classification":
            expected = torch.nn.functional.cross_entropy(out.logits, given)
        else:
            expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, given)
        assert largest(out.loss - expected) < 1e-6, problem
        out.loss.backward()
