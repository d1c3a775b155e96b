"""The recipes on processes that share sequences: step by step the losses of one process, and its scores."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import edit_config
from hub_server import environment, run
from launch_lines import shell_lines
from recipe_runs import assert_mistake
from sequence_processes import run_processes
from test_context_parallel_trainer import launched
from tiny_checkpoints import WORDS, build

import language_modeling
import question_answering
import text_classification
import token_classification
from hf_linattn.distributed.collectives import SequenceGroup

LENGTH = 40
# Name -> (recipe, model, data, flags).
RECIPES: dict[str, tuple[Callable[..., Any], str, str, tuple[str, ...]]] = {
    "causal": (language_modeling.main, "gpt2", "text.jsonl", ()),
    "masked": (language_modeling.main, "bert-mlm", "text.jsonl", ()),
    "texts": (text_classification.main, "bert-classifier", "rows.jsonl", ()),
    "tags": (token_classification.main, "bert", "tags.jsonl", ()),
    "questions": (question_answering.main, "bert", "questions.jsonl", ("--doc_stride", "8")),
}
SLOW = ("tags", "questions")
DROPOUT = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models without dropout; texts of all lengths."""
    path = tmp_path_factory.mktemp("recipes")
    build(path)
    for name in ("gpt2", "bert", "bert-mlm", "bert-classifier"):
        edit_config(path / name, **dict.fromkeys(DROPOUT["gpt2" if name == "gpt2" else "bert"], 0.0))
    words = [WORDS[4 + i % 40 : 5 + i] for i in range(40)]
    write(path / "rows.jsonl", [{"text": " ".join(each), "label": i % 2} for i, each in enumerate(words)])
    tags = [["AB"[len(word) % 2] for word in each] for each in words]
    write(path / "tags.jsonl", [{"tokens": each, "ner_tags": own} for each, own in zip(words, tags, strict=True)])
    answers = [{"text": [each[0]], "answer_start": [0]} for each in words]
    questions = [
        {"question": each[0], "context": " ".join(each), "answers": answer}
        for each, answer in zip(words, answers, strict=True)
    ]
    write(path / "questions.jsonl", questions)
    return path


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(folder: Path, name: str, output: Path, *flags: str) -> list[str]:
    _, model, data, own = RECIPES[name]
    values = {
        "model_name_or_path": folder / model,
        "attention": "favor_sharp",
        "attention_config": json.dumps({"window_size": 4, "num_features": 16}),
        "train_file": folder / data,
        "validation_file": folder / data,
        "max_length": LENGTH,
        "max_eval_samples": 5,
        "output_dir": output,
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    named = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    return [*named, "--do_train", "--do_eval", *own, *flags]


def losses(results: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in results["log"] if "loss" in entry]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RECIPES]
)
def test_two_by_two_processes(folder: Path, name: str, tmp_path: Path) -> None:
    def work(group: SequenceGroup) -> dict[str, Any]:
        os.environ.update(launched(group))
        argv = arguments(folder, name, tmp_path / "shared", "--context_parallel_size", "2")
        return RECIPES[name][0](argv, quiet=True)

    accumulated = ("--gradient_accumulation_steps", "2")
    expected = RECIPES[name][0](arguments(folder, name, tmp_path / "one", *accumulated), quiet=True)
    for found in run_processes(4, work, tmp_path):
        assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
        assert found["training"]["context_parallel_size"] == 2
        for metric, value in expected["metrics"]["eval"].items():
            if not metric.endswith(("_runtime", "_per_second")):
                assert found["metrics"]["eval"][metric] == pytest.approx(value, rel=1e-5, abs=1e-5), metric


MISTAKES = {
    "processes": (("--context_parallel_size", "2"), "must divide the number of processes, 1; got 2"),
    "number": (("--context_parallel_size", "0"), "--context_parallel_size must be at least 1; got 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(folder: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = MISTAKES[name]
    argv = arguments(folder, "texts", tmp_path / "run", *flags)
    assert_mistake(text_classification.main, argv, message, tmp_path / "run", capsys)


@pytest.mark.slow
def test_launch_line(folder: Path, tmp_path: Path) -> None:
    """That of docs/sequence_parallelism.md; the recipe says what runs."""
    page = Path(__file__).parents[2] / "docs" / "sequence_parallelism.md"
    line = next(each for each in shell_lines(page) if "accelerate launch" in each and "cpu.yaml" in each)
    words = shlex.split(line)
    assert "--context_parallel_size" in words
    launcher = words[words.index("launch") + 1 : words.index("recipes/language_modeling.py") + 1]
    flags = arguments(folder, "causal", tmp_path / "run", "--context_parallel_size", "2")
    found = run(["-m", "accelerate.commands.launch", *launcher, *flags], environment(ACCELERATE_USE_CPU="true"))
    assert "4 processes on cpu (DDP, 2 share a sequence), 2 rows a step (1 in a batch x 1 batches x 2)" in found.stderr
