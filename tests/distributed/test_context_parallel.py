"""A model whose sequences several processes share gives what one process gives: output, loss, gradients, a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KINDS
from sequence_processes import run_processes
from sharing import MASKS, assert_close, attention, batch, gradients, mesh, model
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from hf_linattn.distributed.collectives import SequenceGroup
from hf_linattn.training import context_parallel, reduce_gradients

Loss = Callable[[Any, dict[str, Any]], Any]


def rows_labelled(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "labels": torch.tensor([1, 0])}


def spans(found: dict[str, Any]) -> dict[str, Any]:
    del found["labels"]
    return {**found, "start_positions": torch.tensor([2, 5]), "end_positions": torch.tensor([9, 6])}


def few_classes(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "labels": torch.where(found["labels"] < 0, -100, found["labels"] % 2)}


def choices(found: dict[str, Any]) -> dict[str, Any]:
    both = {name: torch.stack([found[name], found[name].flip(0)], 1) for name in ("input_ids", "attention_mask")}
    return {**both, "labels": torch.tensor([1, 0])}


def sentences(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "next_sentence_label": torch.tensor([0, 1])}


HEADS: dict[str, tuple[Any, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "bert-mlm": (BertForMaskedLM, dict),
    "bert-tokens": (BertForTokenClassification, few_classes),
    "bert-causal": (BertLMHeadModel, dict),
    "bert-rows": (BertForSequenceClassification, rows_labelled),
    "bert-choice": (BertForMultipleChoice, choices),
    "bert-pretraining": (BertForPreTraining, sentences),
    "bert-spans": (BertForQuestionAnswering, spans),
    "gpt2": (GPT2LMHeadModel, dict),
    "gpt2-rows": (GPT2ForSequenceClassification, rows_labelled),
}


def step(made: Any, inputs: dict[str, Any], reduce: Callable[[], None]) -> dict[str, Any]:
    """Loss, gradients, and the weights after one step."""
    loss = made(**inputs).loss
    loss.backward()
    reduce()
    found = {"loss": loss.detach(), **gradients(made)}
    torch.optim.SGD(made.parameters(), lr=0.1).step()
    return {**found, **{f"{name} after": p.detach().clone() for name, p in made.named_parameters()}}


def shared(
    head: str, kind: str, how: str, mask: str, processes: int, folder: Path, **changes: Any
) -> list[dict[str, Any]]:
    stock, labelled = HEADS[head]
    made = model(stock, kind, **changes)

    def work(group: SequenceGroup) -> dict[str, Any]:
        parts = mesh(cp=processes)
        with attention(how), context_parallel(made, parts):
            return step(made, labelled(batch(mask)), lambda: reduce_gradients(made, parts))

    return run_processes(processes, work, folder)


def check(head: str, kind: str, how: str, mask: str, processes: int, folder: Path, **changes: Any) -> None:
    stock, labelled = HEADS[head]
    expected = step(model(stock, kind, **changes), labelled(batch(mask)), lambda: None)
    found = shared(head, kind, how, mask, processes, folder, **changes)
    loss = torch.stack([each.pop("loss") for each in found]).mean(0)
    torch.testing.assert_close(loss, expected.pop("loss"), rtol=0, atol=1e-6)
    for each in found:
        assert_close(each, expected)


@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str, tmp_path: Path) -> None:
    check(head, "favor_plus", "slow", "holes", 2, tmp_path)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head", ["bert-mlm", "gpt2", "bert-rows"])
def test_masks(head: str, mask: str, tmp_path: Path) -> None:
    check(head, "favor_plus", "fast", mask, 3, tmp_path)


@pytest.mark.parametrize("processes", [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 4))])
@pytest.mark.parametrize("head", ["bert-mlm", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, head: str, processes: int, tmp_path: Path) -> None:
    check(head, kind, "fast", "left", processes, tmp_path)


@pytest.mark.parametrize("number", [2, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_global_tokens(kind: str, number: int, tmp_path: Path) -> None:
    """13 are more than a part of 29 tokens would have on three processes."""
    check("bert-mlm", kind, "fast", "left", 3, tmp_path, num_global_tokens=number)
