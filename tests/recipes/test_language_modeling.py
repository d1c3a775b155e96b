"""The language modelling recipe on tiny models: what it trains and measures, and how it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_runs import assert_mistake, assert_same_weights, pushed, train, two_processes, weights
from tiny_checkpoints import WORDS, build
from torch.nn.functional import cross_entropy
from transfer_recipe import LENGTH
from transfer_recipe import arguments as transfer_arguments
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    EvalPrediction,
    GPT2LMHeadModel,
)

import evaluate_checkpoint
import language_modeling
from parts.masking import IGNORED, MaskingCollator, next_token_collator

RECIPE = "recipes/language_modeling.py"
TRANSFER = ("--transfer_steps", "2", "--attention_config", '{"window_size": 2}')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("language_modeling")
    build(path)
    tokenizer = AutoTokenizer.from_pretrained(path / "bert-mlm")
    tokenizer.save_pretrained(path / "distilbert")
    sizes = {"vocab_size": 60, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    DistilBertForMaskedLM(DistilBertConfig(**sizes, max_position_embeddings=64)).save_pretrained(path / "distilbert")
    tokenizer.add_tokens([f"new{i}" for i in range(6)])
    tokenizer.save_pretrained(path / "longer")
    return path


def arguments(folder: Path, output: Path, family: str = "gpt2", kind: str = "favor_plus", *changes: str) -> list[str]:
    """The command line of six steps in two epochs, scored on some of the same texts."""
    flags = ["--validation_file", str(folder / "text.jsonl"), "--max_train_samples", "12", "--learning_rate", "1e-2"]
    return transfer_arguments(folder, output, family, kind, *flags, *changes)


def without(argv: list[str], *names: str) -> list[str]:
    for name in names:
        del argv[argv.index(name) : argv.index(name) + 2]
    return argv


def run(argv: list[str]) -> dict[str, Any]:
    return language_modeling.main(argv, quiet=True)


# -- what is measured ---------------------------------------------------------------------------------------------
def test_perplexity_of_next_tokens(folder: Path, tmp_path: Path) -> None:
    argv = without(arguments(folder, tmp_path, "gpt2", "softmax"), "--attention_config")
    found = run([*argv, "--learning_rate", "0"])["metrics"]["eval"]
    model, tokenizer = (
        GPT2LMHeadModel.from_pretrained(folder / "gpt2").eval(),
        AutoTokenizer.from_pretrained(folder / "gpt2"),
    )
    words = " ".join(json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines())
    ids = torch.tensor(tokenizer(words)["input_ids"][: 6 * LENGTH]).view(6, LENGTH)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    nll = cross_entropy(logits, ids[:, 1:].flatten())
    assert found["eval_nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(nll.exp().item(), rel=1e-5)
    right = (logits.argmax(-1) == ids[:, 1:].flatten()).float().mean()
    assert found["eval_accuracy"] == pytest.approx(right.item())


def test_scores_of_rows() -> None:
    logits, labels = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    labels[0, 2:] = labels[1, 0] = IGNORED
    for shifted in (False, True):
        kept = language_modeling.sums((logits, None), labels, shifted)
        assert kept.shape == (3, 3)
        found = language_modeling.score(EvalPrediction(kept.numpy(), labels.numpy()))
        scores, tokens = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
        rows = [cross_entropy(row, each).item() for row, each in zip(scores, tokens, strict=True)]
        assert found.rows == pytest.approx(rows, rel=1e-5)
        mean = cross_entropy(scores.flatten(0, 1), tokens.flatten()).item()
        assert found.metrics["nll"] == pytest.approx(mean, rel=1e-5)
    assert language_modeling.score(EvalPrediction(np.array([[8e5, 0, 1]]), None)).metrics["perplexity"] == math.inf


def test_a_loss_of_tokens_is_divided_by_those_that_are_predicted(folder: Path, tmp_path: Path) -> None:
    """Accumulated steps and the number of tokens of a batch change nothing; the first token of a row is no target."""
    labels = next_token_collator([{"input_ids": [4, 5, 6]}])["labels"]
    assert labels.tolist() == [[IGNORED, 5, 6]]
    losses = []
    for rows, steps in ((4, 1), (1, 4)):
        sizes = ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(steps)]
        log = run(arguments(folder, tmp_path / str(rows), "gpt2", "favor_plus", *sizes, "--max_steps", "1"))["log"]
        losses.append(log[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # dropout differs


@pytest.mark.parametrize("family", ["gpt2", "bert-mlm"])
def test_a_checkpoint_beside_softmax(folder: Path, tmp_path: Path, family: str) -> None:
    trained = run(arguments(folder, tmp_path, family, "eva", "--max_steps", "1"))["metrics"]["eval"]
    argv = ["--model_name_or_path", str(tmp_path), "--validation_file", str(folder / "text.jsonl"), "--repeats", "1"]
    args, data, _ = evaluate_checkpoint.read_flags([*argv, "--max_length", str(LENGTH), "--max_eval_samples", "6"])
    ours, softmax = (evaluate_checkpoint.measure(args, data, str(tmp_path), softmax, "") for softmax in (False, True))
    assert (ours["attention"], softmax["attention"]) == ("eva", "softmax")
    assert ours["perplexity"] == pytest.approx(trained["eval_perplexity"])
    assert softmax["perplexity"] != pytest.approx(trained["eval_perplexity"])


# -- masks --------------------------------------------------------------------------------------------------------
def test_masks_follow_from_seed_epoch_and_row(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert-mlm")
    rows = [{"input_ids": [2, *torch.randint(4, 54, (198,)).tolist(), 3]} for _ in range(20)]
    collate = MaskingCollator(tokenizer, 0.15, seed=3)
    batch = collate(rows)
    assert torch.equal(collate(rows[::-1])["labels"].flip(0), batch["labels"])
    again = MaskingCollator(tokenizer, 0.15, seed=3)
    assert torch.equal(again(rows)["input_ids"], batch["input_ids"])
    assert not torch.equal(MaskingCollator(tokenizer, 0.15, seed=4)(rows)["labels"], batch["labels"])
    again.set_epoch(1)
    assert not torch.equal(again(rows)["labels"], batch["labels"])

    ids, labels = torch.tensor([row["input_ids"] for row in rows]), batch["labels"]
    hidden = labels != IGNORED
    assert torch.equal(labels[hidden], ids[hidden])
    assert torch.equal(batch["input_ids"][~hidden], ids[~hidden])
    assert not hidden[:, [0, -1]].any()  # [CLS] and [SEP]
    assert hidden.float().mean() == pytest.approx(0.15, abs=0.02)
    masked = batch["input_ids"][hidden] == WORDS.index("[MASK]")
    assert masked.float().mean() == pytest.approx(0.8, abs=0.06)


def test_every_row_has_something_to_predict(folder: Path) -> None:
    collate = MaskingCollator(AutoTokenizer.from_pretrained(folder / "bert-mlm"), 1e-9, seed=0)
    batch = collate([{"input_ids": [2, 10, 11, 12, 3]}])
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 11, IGNORED, IGNORED]]
    assert collate([{"input_ids": [2, 10], "labels": [IGNORED, 11]}])["labels"].tolist() == [[IGNORED, 11]]


def test_evaluation_masks_the_same_tokens_each_time(folder: Path, tmp_path: Path) -> None:
    argv = arguments(folder, tmp_path, "bert-mlm", "favor_plus", "--eval_strategy", "steps", "--eval_steps", "2")
    found = run([*argv, "--learning_rate", "0"])
    losses = [entry["eval_nll"] for entry in found["log"] if "eval_nll" in entry]
    assert len(losses) == 4
    assert losses == [losses[0]] * 4
    assert found["metrics"]["eval"]["eval_loss"] == pytest.approx(losses[0], rel=0.05)  # a mean over batches


# -- going on -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "kind", "cut", "changes"),
    [
        ("gpt2", "eva", 5, ()),  # in the second epoch
        ("bert-mlm", "lara", 5, ()),
        ("bert-mlm", "favor_plus", 3, ("--streaming", *TRANSFER)),
        pytest.param("gpt2", "favor_plus", 3, TRANSFER, marks=pytest.mark.slow),
        pytest.param("gpt2", "favor_sharp", 5, ("--lora_target_modules", "c_attn"), marks=pytest.mark.slow),
        pytest.param(
            "bert-mlm",
            "favor_plus",
            5,
            ("--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_was_cut_ends_with_the_same_weights(
    folder: Path, tmp_path: Path, family: str, kind: str, cut: int, changes: tuple[str, ...]
) -> None:
    whole, argv = (arguments(folder, tmp_path / name, family, kind, *changes) for name in ("whole", "cut"))
    seen = train(whole, main=language_modeling.main).seen
    assert len(seen) == 24
    if "--streaming" not in changes:  # other masks in the second epoch
        assert (sorted(seen[:12]) != sorted(seen[12:])) == (family == "bert-mlm")
    train(argv, cut, language_modeling.main)
    assert train(argv, main=language_modeling.main).seen == seen[4 * (cut - 1) // 2 * 2 :]
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "bert-mlm"])
def test_two_processes_measure_what_one_does(folder: Path, tmp_path: Path, family: str) -> None:
    argv = [arguments(folder, tmp_path / name, family, "eva", "--max_eval_samples", "13") for name in ("one", "two")]
    still = ["--learning_rate", "0", "--max_steps", "2", "--per_device_eval_batch_size", "2"]
    one = run([*argv[0], *still])
    two_processes(RECIPE, [*argv[1], *still], folder / "home")
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("eval_nll", "eval_perplexity", "eval_accuracy", "eval_loss"):
        assert two["metrics"]["eval"][name] == pytest.approx(one["metrics"]["eval"][name], rel=1e-6)
    assert two["metrics"]["train"]["train_loss"] == pytest.approx(one["metrics"]["train"]["train_loss"], rel=0.2)


@pytest.mark.hub
def test_pushed_and_loaded(folder: Path, tmp_path: Path) -> None:
    code = """
import hf_linattn, transformers
model = transformers.AutoModelForMaskedLM.from_pretrained("local/it")
assert model.config.linear_attention["kind"] == "lara"
assert transformers.AutoTokenizer.from_pretrained("local/it").mask_token == "[MASK]"
"""
    argv = arguments(folder, tmp_path / "out", "bert-mlm", "lara", "--max_steps", "2")
    files, card = pushed(RECIPE, argv, folder / "home", code)
    assert files == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    found = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["eval"]["eval_perplexity"]
    assert f"| perplexity | {found:.4g} |" in card


# -- models -------------------------------------------------------------------------------------------------------
def test_from_scratch(folder: Path, tmp_path: Path) -> None:
    sizes = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=48"
    argv = without(arguments(folder, tmp_path, "bert-mlm"), "--model_name_or_path", "--max_length")
    argv += ["--model_type", "bert", "--config_overrides", sizes, "--tokenizer_name", str(folder / "bert-mlm")]
    found = run(argv)
    assert (found["data"]["objective"], found["data"]["max_length"]) == ("masked", 48)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(WORDS)
    assert model.config.linear_attention["kind"] == "favor_plus"
    assert model(torch.ones(1, 48, dtype=torch.long)).logits.isfinite().all()


def test_a_causal_bert(folder: Path, tmp_path: Path) -> None:
    argv = arguments(folder, tmp_path / "first", "bert-mlm", "favor_plus", "--objective", "causal", "--max_steps", "1")
    found = run(argv)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    assert type(model).__name__ == "LinAttnBertLMHeadModel"
    ids = torch.randint(4, 54, (1, 20))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits[:, :10], model(ids[:, :10]).logits, atol=1e-5)
    argv = without(arguments(folder, tmp_path / "second", "bert-mlm", "keep"), "--attention_config")
    again = run([*without(argv, "--model_name_or_path"), "--model_name_or_path", str(tmp_path / "first")])
    assert found["data"]["objective"] == again["data"]["objective"] == "causal"


def test_more_positions(folder: Path, tmp_path: Path) -> None:
    argv = without(arguments(folder, tmp_path, "gpt2"), "--max_length")
    found = run([*argv, "--extend_positions", "160", "--max_steps", "1", *TRANSFER])
    assert found["data"]["max_length"] == 160
    assert found["adaptation"]["transfer"]["steps"] == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.n_positions == 160
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 160


def test_lora(folder: Path, tmp_path: Path) -> None:
    run(arguments(folder, tmp_path, "gpt2", "favor_plus", "--lora_target_modules", "c_attn", "--max_steps", "1"))
    before, after = GPT2LMHeadModel.from_pretrained(folder / "gpt2").state_dict(), weights(tmp_path)
    moved = {name for name, value in after.items() if name in before and not torch.equal(value, before[name])}
    assert {name.split(".")[-2] for name in moved} == {"c_attn"}


def test_held_out_texts(folder: Path, tmp_path: Path) -> None:
    argv = without(arguments(folder, tmp_path, "gpt2"), "--validation_file", "--max_train_samples")
    flags = ["--validation_split_percentage", "20", "--max_eval_samples", "1000"]
    found: dict[str, list[list[int]]] = {}

    def keep(data: Any, max_length: int) -> None:
        found.update({split: rows["input_ids"] for split, rows in data.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_modeling, "check_rows", keep)
        run([*argv, *flags, "--max_steps", "1"])
    lines = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    for split, texts in (("validation", lines[:30]), ("train", lines[30:])):
        ids = tokenizer(" ".join(texts))["input_ids"]
        assert found[split] == [ids[i : i + LENGTH] for i in range(0, len(ids) // LENGTH * LENGTH, LENGTH)]


# -- mistakes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", ["--objective", "masked"], "A model of type 'gpt2' has no masked language model"),
        ("gpt2", ["--objective", "prefix"], "--objective must be 'causal' or 'masked'; got 'prefix'"),
        ("gpt2", ["--mlm_probability", "1"], "--mlm_probability must be between 0 and 1; got 1.0"),
        ("gpt2", ["--validation_split_percentage", "0"], "--validation_split_percentage must be from 1 to 99; got 0"),
        ("gpt2", ["--max_length", "96"], "--max_length must be at most 64"),
        ("gpt2", ["--max_length", "4"], "--max_length must be at least 8; got 4"),
        ("gpt2", ["--text_column", "body"], "--text_column 'body' is not a column of the data"),
        ("gpt2", ["--text_column", "label"], "Column 'label' has values that are not text"),
        ("gpt2", ["--validation_file", "empty.txt"], "has no rows"),
        ("gpt2", ["--validation_file", "short.txt"], "The validation data gives no row of 40 tokens"),
        ("gpt2", ["--validation_file", "none.txt"], "'none.txt' does not exist"),
        ("gpt2", ["--do_predict"], "The run needs test data"),
        ("gpt2", ["--mlm_probabilty", "0.2"], "Did you mean '--mlm_probability'?"),
        ("gpt2", ["--config", "run.yaml"], "'mlm' is not a flag of this recipe"),
        ("gpt2", ["--model_type", "gpt2"], "Give one of --model_name_or_path"),
        ("gpt2", ["--tokenizer_name", "longer"], "The tokenizer has 61 tokens and the model 60"),
        ("vit", ["--train_file", "short.txt"], "A model of type 'vit' has no causal language model"),
        ("bert-mlm", ["--tokenizer_name", "gpt2"], "--objective masked needs a mask token"),
        ("distilbert", [], "the architectures ['bert', 'gpt2', 'vit']; got model_type 'distilbert'"),
    ],
)
def test_mistakes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
    changes: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    Path("short.txt").write_text("w1 w2")
    Path("empty.txt").write_text("")
    Path("run.yaml").write_text("mlm: 0.2")
    argv = arguments(folder, tmp_path / "out", family, "favor_plus", *changes)
    assert_mistake(language_modeling.main, argv, message, tmp_path / "out", capsys)
