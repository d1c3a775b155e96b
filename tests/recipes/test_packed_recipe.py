"""Packed rows in the language modelling recipe: whole texts, each of which sees itself alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from recipe_runs import assert_mistake
from tiny_checkpoints import build
from torch.nn.functional import cross_entropy
from transfer_recipe import LENGTH
from transfer_recipe import arguments as transfer_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer

import language_modeling
from hf_linattn.data.rows import whole_texts
from parts.masking import IGNORED
from parts.packing import PackingCollator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packing")
    build(path)
    return path


def arguments(folder: Path, output: Path, family: str, kind: str, *changes: str) -> list[str]:
    flags = ["--validation_file", str(folder / "text.jsonl"), "--max_train_samples", "12", "--packing"]
    return transfer_arguments(folder, output, family, kind, *flags, *changes)


def pieces_of(row: dict[str, Any]) -> list[torch.Tensor]:
    """`[1, tokens]` of every text of a row."""
    starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    return list(torch.tensor([row["input_ids"]]).tensor_split(starts[1:], dim=1))


def run(argv: list[str]) -> dict[str, Any]:
    return language_modeling.main(argv, quiet=True)


def test_packed_rows_hold_whole_texts(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    data = load_dataset("json", data_files=str(folder / "text.jsonl"), split="train")
    rows = whole_texts(data, None, tokenizer, LENGTH, "text_column")
    texts = [ids for text in data["text"] for ids in _cut(tokenizer(text)["input_ids"], LENGTH)]
    found = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["position_ids"]) <= LENGTH
        found += [piece[0].tolist() for piece in pieces_of(row)]
    assert sorted(found) == sorted(texts)
    assert sum(map(len, texts)) > 0.9 * LENGTH * len(rows)
    batch = PackingCollator(LENGTH, padding=0)(list(rows.select(range(3))))
    starts = batch["position_ids"] == 0
    predicted = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][predicted], batch["input_ids"][predicted])
    assert not bool((predicted & starts).any())


def _cut(ids: list[int], length: int) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids), length)]


@pytest.mark.parametrize("kind", ["favor_plus", "softmax", pytest.param("lara", marks=pytest.mark.slow)])
def test_packed_texts_are_scored_as_if_alone(folder: Path, tmp_path: Path, kind: str) -> None:
    argv = arguments(folder, tmp_path, "gpt2", kind, "--learning_rate", "0")
    if kind == "softmax":
        place = argv.index("--attention_config")
        del argv[place : place + 2]
    found = run(argv)["metrics"]["eval"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    data = load_dataset("json", data_files=str(folder / "text.jsonl"), split="train")
    rows = whole_texts(data, None, tokenizer, LENGTH, "text_column").select(range(6))
    total, count = 0.0, 0
    for row in rows:
        for piece in pieces_of(row):
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            total += cross_entropy(logits, piece[0, 1:], reduction="sum").item()
            count += piece.shape[1] - 1
    assert found["eval_nll"] == pytest.approx(total / count, rel=1e-4)


def test_where_texts_would_see_each_other(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(folder, tmp_path / "out", "bert-mlm", "favor_plus")
    assert_mistake(language_modeling.main, argv, "--packing is for causal models", tmp_path / "out", capsys)


def test_training(folder: Path, tmp_path: Path) -> None:
    log: list[dict[str, Any]] = run(arguments(folder, tmp_path, "gpt2", "eva", "--learning_rate", "1e-2"))["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
