"""What recipes do before and around fine-tuning: attention transfer, LoRA, longer positions, streams."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import ROWS, arguments, assert_same_weights, train, two_processes, weights
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import text_classification
from parts.adaptation import adapt
from parts.common import RecipeError
from parts.finetuning import read_flags
from parts.kept import Kept
from scripts.kill_parts.inputs import WORDS, build

# Learned maps are trained, not drawn: without what is random in the other runs.
TRANSFER = ("--transfer_steps", "3", "--attention_config", '{"window_size": 2}')
LORA = ("--lora_target_modules", "query,value")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adaptation")
    build(path, ROWS)
    return path


def short(folder: Path, output: Path, kind: str = "favor_plus", *changes: str) -> list[str]:
    return arguments(folder, output, kind, "--max_steps", "4", *changes)


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize("kind", ["favor_sharp", "lara"])
def test_transfer_comes_first(folder: Path, tmp_path: Path, kind: str) -> None:
    train(short(folder, tmp_path, kind, *TRANSFER, "--learning_rate", "0"))
    found = results(tmp_path)
    assert found["attention"]["learned"] is True
    assert found["adaptation"]["transfer"]["steps"] == 3
    assert 0 < found["adaptation"]["transfer"]["error"] < 1
    # Fine-tuning had a rate of 0: what has moved is what the transfer trains.
    before = load_file(folder / "model" / "model.safetensors")
    after = weights(tmp_path)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(".linattn." in name for name in after)


@pytest.mark.parametrize("kind", ["favor_plus", "favor_sharp"])
def test_labels_are_not_looked_at(folder: Path, tmp_path: Path, kind: str) -> None:
    flags = read_flags(text_classification.ARGUMENTS, short(folder, tmp_path, kind, *TRANSFER), None, quiet=True)
    task = text_classification.prepare(flags)
    seen: set[str] = set()
    task.model.register_forward_pre_hook(lambda model, inputs, named: seen.update(named), with_kwargs=True)
    rows = task.data["train"]
    done = adapt(
        task.model, rows, rows, task.collate, flags.adaptation, flags.training, Kept(flags.training, {}, False)
    )
    assert done["transfer"]["steps"] == 3
    assert "input_ids" in seen
    assert not any("label" in name for name in seen)


def test_a_finished_run_is_left_alone(folder: Path, tmp_path: Path) -> None:
    flags = short(folder, tmp_path, "favor_plus", *TRANSFER, "--lr_scheduler_type", "constant")
    train(flags)
    first, metrics = weights(tmp_path), results(tmp_path)["metrics"]["eval"]
    again = train(flags)
    assert "transfer" not in results(tmp_path)["adaptation"]  # the checkpoint has it already
    assert len(again.seen) == 0
    assert all(torch.equal(value, first[name]) for name, value in weights(tmp_path).items())
    assert results(tmp_path)["metrics"]["eval"]["eval_loss"] == metrics["eval_loss"]


@pytest.mark.parametrize("changes", [TRANSFER, LORA, (*TRANSFER, *LORA)], ids=["transfer", "lora", "both"])
def test_a_run_that_was_cut_ends_with_the_same_weights(folder: Path, tmp_path: Path, changes: tuple[str, ...]) -> None:
    train(short(folder, tmp_path / "whole", "lara", *changes))
    train(short(folder, tmp_path / "cut", "lara", *changes), cut_after=3)
    train(short(folder, tmp_path / "cut", "lara", *changes))
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_two_processes_adapt_and_train_as_one_does(tmp_path: Path) -> None:
    """Texts of one length, since a batch's error is a mean over its tokens; and no dropout, which every rank draws."""
    build(tmp_path, ROWS)
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS[2:], k=30)), "label": i % 2} for i in range(ROWS)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_dropout_prob": 0.0}))
    changes = (*TRANSFER, *LORA, "--save_strategy", "no", "--per_device_eval_batch_size", "5")
    train(short(tmp_path, tmp_path / "one", "favor_plus", *changes))
    argv = short(tmp_path, tmp_path / "two", "favor_plus", *changes, "--per_device_train_batch_size", "2")
    two_processes("recipes/text_classification.py", argv, tmp_path / "home")
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["adaptation"]["transfer"]["error"] == pytest.approx(one["adaptation"]["transfer"]["error"], rel=1e-4)
    assert two["metrics"]["eval"]["eval_loss"] == pytest.approx(one["metrics"]["eval"]["eval_loss"], rel=1e-4)
    assert two["metrics"]["eval"]["eval_accuracy"] == one["metrics"]["eval"]["eval_accuracy"]
    theirs = weights(tmp_path / "two")
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-3)


def test_lora_ends_as_a_whole_model(folder: Path, tmp_path: Path) -> None:
    train(short(folder, tmp_path, "lara", *LORA))
    base, after = load_file(folder / "model" / "model.safetensors"), weights(tmp_path)
    moved = {name for name, value in base.items() if not torch.equal(after[name], value)}
    assert {".".join(name.split(".")[-2:]) for name in moved} == {
        "query.weight",
        "value.weight",
        "classifier.weight",
        "classifier.bias",
    }
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.linear_attention["kind"] == "lara"
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in adapter)
    assert any("linattn" in name for name in adapter)
    with pytest.raises(RecipeError, match="a run that trained LoRA; this one trains the whole model"):
        text_classification.main(short(folder, tmp_path, "lara"))


def test_lora_does_not_go_on_from_a_whole_model(folder: Path, tmp_path: Path) -> None:
    train(arguments(folder, tmp_path, "lara", "--max_steps", "2"))
    with pytest.raises(RecipeError, match="a run that trained the whole model; this one trains LoRA"):
        text_classification.main(short(folder, tmp_path, "lara", *LORA))


@pytest.mark.parametrize(("target", "message"), [("qury", "no module is called 'qury'"), ("LayerNorm", "LayerNorm")])
def test_modules_are_checked_before_the_transfer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    monkeypatch.setattr("parts.finetuning.adapt", lambda *_: pytest.fail("attention transfer ran"))
    with pytest.raises(RecipeError, match=message):
        text_classification.main(short(folder, tmp_path / "out", "lara", *TRANSFER, "--lora_target_modules", target))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("keep", TRANSFER[:2], "--transfer_steps needs a kind of linear attention: give --attention"),
        ("favor_plus", ("--lora_target_modules", "qury"), "no module is called 'qury' in LinAttnBertForSequence"),
        ("favor_plus", ("--extend_positions", "32"), "num_positions must be at least the 64 positions"),
        ("favor_plus", ("--max_length", "96"), "--max_length must be at most 64.*--extend_positions 96"),
        ("favor_plus", ("--streaming", "--max_steps", "-1"), "--streaming needs --max_steps"),
        ("favor_plus", ("--model_name_or_path", "nowhere/at-all"), "'nowhere/at-all' cannot be loaded"),
        ("favor_plus", ("--train_file", "empty.jsonl"), "--train_file 'empty.jsonl' has no rows"),
    ],
)
def test_mistakes(
    folder: Path,
    tmp_path: Path,
    kind: str,
    changes: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    with pytest.raises((RecipeError, ValueError), match=message):
        text_classification.main(short(folder, tmp_path / "out", kind, *changes))
    assert not (tmp_path / "out").exists()


def test_positions_are_longer_in_model_tokenizer_and_checkpoint(folder: Path, tmp_path: Path) -> None:
    train(short(folder, tmp_path, "favor_plus", "--extend_positions", "256"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.max_position_embeddings == 256
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 256
    assert results(tmp_path)["data"]["max_length"] == 256
    assert model(input_ids=torch.ones(1, 256, dtype=torch.long)).logits.isfinite().all()


def test_a_stream_trains_as_stored_rows_do(folder: Path, tmp_path: Path) -> None:
    train(short(folder, tmp_path / "whole", "favor_sharp", "--streaming", *TRANSFER))
    train(short(folder, tmp_path / "cut", "favor_sharp", "--streaming", *TRANSFER), cut_after=3)
    train(short(folder, tmp_path / "cut", "favor_sharp", "--streaming", *TRANSFER))
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert results(tmp_path / "whole")["metrics"]["eval"]["eval_accuracy"] >= 0
