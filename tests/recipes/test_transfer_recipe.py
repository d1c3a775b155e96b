"""The attention transfer recipe on tiny models of every family: what it trains, what it says, and how it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BY_NAME
from hub_server import environment, run
from huggingface_hub import ModelCard
from recipe_runs import CutAfter, CutError, assert_same_weights, weights
from safetensors.torch import load_file
from tiny_checkpoints import build
from transfer_recipe import LENGTH, RECIPE, arguments
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertModel,
    GPT2LMHeadModel,
    TrainerCallback,
    ViTForImageClassification,
    ViTImageProcessor,
)

import attention_transfer
import hf_linattn
from hf_linattn.modules.registry import get_kind
from parts.common import RecipeError
from parts.unlabelled import UnlabelledArguments, read_rows
from scripts.kill_parts.groups import run_group

STOCK = {**{name: case.stock for name, case in BY_NAME.items()}, "bert": BertModel}
CONVERTED = {name: getattr(hf_linattn, f"LinAttn{stock.__name__}") for name, stock in STOCK.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transfer")
    build(path)
    return path


def transfer(argv: Sequence[str], cut_after: int | None = None, *callbacks: TrainerCallback) -> dict[str, Any]:
    """Run the recipe; with `cut_after`, until that step. Returns its results."""
    if cut_after is None:
        return attention_transfer.main(argv, callbacks)
    with pytest.raises(CutError):
        attention_transfer.main(argv, [CutAfter(cut_after), *callbacks])
    return {}


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def logged(found: dict[str, Any], name: str) -> list[float]:
    return [entry[name] for entry in found["log"] if name in entry]


# -- the whole run ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("gpt2", "favor_sharp"),  # is calibrated first
        ("vit", "eva"),
        ("bert-mlm", "lara"),
        *(
            pytest.param(family, kind, marks=pytest.mark.slow)
            for family, kind in (("bert", "favor_plus"), ("bert-classifier", "favor_sharp"), ("gpt2", "eva"))
        ),
    ],
)
def test_only_the_maps_are_trained(folder: Path, tmp_path: Path, family: str, kind: str) -> None:
    found = transfer(arguments(folder, tmp_path, family, kind, "--base_model", "some/base", "--ablations"))
    base, trained = STOCK[family].from_pretrained(folder / family), CONVERTED[family].from_pretrained(tmp_path)
    base, trained = base.state_dict(), trained.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in base.items())
    assert all(".linattn." in name for name in trained.keys() - base.keys())
    assert results(tmp_path)["attention"]["learned"] is True
    fidelity = found["fidelity"]
    assert fidelity["after"]["mean_layer_error"] < fidelity["before"]["mean_layer_error"]
    assert fidelity["after"]["rows"] == 6

    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some/base"
    for said in (
        "## Attention transfer",
        f"| {'images.parquet' if family == 'vit' else 'text.jsonl'} |",
        f"| steps | 6, of 4 {'images' if family == 'vit' else f'rows of {LENGTH} tokens'} each |",
        "| **after transfer** |",
        "| slots shuffled |",
        "by as much as is said above",
    ):
        assert said in card.text
    assert ("calibrated before on | 12" in card.text) == (get_kind(kind).calibrated_field is not None)
    for number, layer in enumerate(fidelity["after"]["layers"]):
        before = fidelity["before"]["layers"][number]["error"]
        assert f"| `{layer['name']}` | {before:.3f} | {layer['error']:.3f} |" in card.text


def test_a_converted_checkpoint_is_compared_and_trained_on(folder: Path, tmp_path: Path) -> None:
    first = transfer(arguments(folder, tmp_path / "first"))
    keep = ["--model_name_or_path", str(tmp_path / "first"), "--attention", "keep"]
    argv = arguments(folder, tmp_path / "second", "gpt2", "keep")
    argv[argv.index("--attention_config") : argv.index("--attention_config") + 2] = []
    compared = transfer([argument for argument in [*argv, *keep] if argument != "--do_train"])
    assert compared["fidelity"]["after"] == first["fidelity"]["after"]
    assert "before" not in compared["fidelity"]
    assert not (tmp_path / "second" / "model.safetensors").exists()
    second = transfer([*argv, *keep])
    assert second["fidelity"]["before"] == first["fidelity"]["after"]  # nothing starts anew
    assert second["fidelity"]["after"]["mean_layer_error"] < first["fidelity"]["after"]["mean_layer_error"]


def test_second_stage(folder: Path, tmp_path: Path) -> None:
    flags = ["--max_steps", "4", "--second_stage_steps", "3", "--second_stage_learning_rate", "1e-3"]
    targets: list[str] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            targets.extend({int(each["step"]) for each in optimizer.state.values()})

    found = transfer([*arguments(folder, tmp_path), *flags], None, Watch())
    assert targets == [1, 2, 3, 4, 1, 2, 3]  # the optimizer begins anew
    rates = logged(found, "learning_rate")
    assert rates[0] == 3e-2
    assert rates[3] < rates[2] < rates[1] < rates[0]
    assert rates[4] == 1e-3
    assert rates[6] < rates[5] < rates[4]
    assert "| second stage | 3 steps more" in ModelCard.load(tmp_path / "README.md").text


def test_the_second_stage_begins_with_a_third_of_the_rate(folder: Path, tmp_path: Path) -> None:
    flags = ["--max_steps", "2", "--second_stage_steps", "2", "--learning_rate", "0.03"]
    found = transfer([*arguments(folder, tmp_path), *flags, "--lr_scheduler_type", "constant"])
    assert logged(found, "learning_rate") == pytest.approx([0.03, 0.03, 0.01, 0.01])


def test_the_second_stage_has_another_target(folder: Path, tmp_path: Path) -> None:
    """Where nothing is learned any more, the loss on the held-out rows changes with the target alone."""
    flags = ["--max_steps", "2", "--second_stage_steps", "3", "--second_stage_learning_rate", "1e-12"]
    found = transfer([*arguments(folder, tmp_path), *flags, "--eval_strategy", "steps", "--eval_steps", "1"])
    losses = logged(found, "eval_loss")
    assert losses[2] != pytest.approx(losses[1], rel=0.01)
    assert losses[3:] == pytest.approx([losses[2]] * 2, rel=1e-4)


def test_some_layers(folder: Path, tmp_path: Path) -> None:
    transfer(arguments(folder, tmp_path, "gpt2", "favor_plus", "--transfer_layers", "1"))
    untrained = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    changed = {name for name, value in weights(tmp_path).items() if not torch.equal(value, untrained[name])}
    assert changed
    assert all(".1." in name for name in changed)
    card = ModelCard.load(tmp_path / "README.md").text
    assert "| layers | 1 |" in card


# -- going on -----------------------------------------------------------------------------------------------------
STAGES = ["--max_steps", "4", "--second_stage_steps", "4"]


@pytest.mark.parametrize(
    ("cut", "changes"),
    [
        (3, STAGES),
        (7, [*STAGES, "--streaming"]),
        *(pytest.param(cut, changes, marks=pytest.mark.slow) for cut in (5, 7) for changes in (STAGES, ["--bf16"])),
    ],
)
def test_a_run_that_was_cut_ends_with_the_same_weights(
    folder: Path, tmp_path: Path, cut: int, changes: list[str]
) -> None:
    changes = [*changes, "--max_steps", "8"] if "--max_steps" not in changes else changes
    transfer(arguments(folder, tmp_path / "whole", "gpt2", "lara", *changes))
    argv = arguments(folder, tmp_path / "cut", "gpt2", "lara", *changes)
    transfer(argv, cut)
    transfer(argv)
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


def test_images_go_on_too(folder: Path, tmp_path: Path) -> None:
    """Their checkpoints have an image processor in place of a tokenizer."""
    argv = arguments(folder, tmp_path, "vit")
    transfer(argv)
    whole = weights(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-6")
    transfer(argv)
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path).items())
    assert (tmp_path / "preprocessor_config.json").is_file()
    assert not list(tmp_path.glob("_damaged-*"))


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        ("forked", []),
        pytest.param("forked", ["--streaming"], marks=pytest.mark.slow),
        pytest.param("accelerate", [], marks=pytest.mark.slow),
    ],
)
def test_two_processes(folder: Path, tmp_path: Path, launcher: str, changes: list[str]) -> None:
    """Two processes of two rows each are one of four."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = environment(HF_HOME=str(folder / "home"), ACCELERATE_USE_CPU="true")
    flags = [*STAGES, *changes]
    two = arguments(folder, tmp_path / "two", "gpt2", "favor_plus", *flags, "--per_device_train_batch_size", "2")
    if launcher == "forked":
        ended = run_group("attention_transfer", two, tmp_path / "logs", tmp_path / "two")
        assert ended.statuses == [0, 0], ended.logs
        said = "".join(ended.logs)
    else:
        said = run([*launch, RECIPE, *two], env).stderr
    assert said.count("Wrote") == 1
    one = transfer(arguments(folder, tmp_path / "one", "gpt2", "favor_plus", *flags))
    found = results(tmp_path / "two")
    assert (one["processes"], found["processes"]) == (1, 2)
    before, after = (found["fidelity"][name]["mean_layer_error"] for name in ("before", "after"))
    assert before == pytest.approx(one["fidelity"]["before"]["mean_layer_error"], rel=1e-4)
    if not changes:  # of a stream each process takes other rows
        assert logged(found, "error") == pytest.approx(logged(one, "error"), rel=1e-3)
    assert after < before


# -- data ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def gpt2(folder: Path) -> tuple[Any, Any]:
    return GPT2LMHeadModel.from_pretrained(folder / "gpt2"), AutoTokenizer.from_pretrained(folder / "gpt2")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("file", ["text.jsonl", "text.txt"])
def test_texts_are_joined_into_rows(folder: Path, gpt2: tuple[Any, Any], file: str, streaming: bool) -> None:
    in_order = {"streaming": True, "shuffle_buffer": 1} if streaming else {}
    args = UnlabelledArguments(train_file=str(folder / file), max_length=LENGTH, max_eval_samples=3, **in_order)
    rows = read_rows(*gpt2, args, seed=0)
    words = " ".join(json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines())
    expected = torch.tensor(gpt2[1](words)["input_ids"])
    expected = expected[: len(expected) // LENGTH * LENGTH].view(-1, LENGTH)
    number = len(expected) - 3
    train = [row["input_ids"] for row, _ in zip(rows.train, range(number), strict=False)]
    assert [row["input_ids"] for row in rows.held_out] == expected[:3].tolist()
    assert train == expected[3:].tolist()
    assert {len(row["input_ids"]) for row in rows.calibration} == {LENGTH}
    batch = rows.collate([rows.held_out[0], rows.held_out[1]])
    assert torch.equal(batch["input_ids"], expected[:2])
    assert list(batch) == ["input_ids"]


def test_every_row_has_the_special_tokens(folder: Path) -> None:
    model, tokenizer = (load.from_pretrained(folder / "bert-mlm") for load in (AutoModel, AutoTokenizer))
    args = UnlabelledArguments(train_file=str(folder / "text.jsonl"), max_length=LENGTH)
    rows = read_rows(model, tokenizer, args, seed=0)
    found = [row["input_ids"] for row in rows.train]
    assert {(ids[0], ids[-1], len(ids)) for ids in found} == {(2, 3, LENGTH)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", [{"train_file": "images.parquet"}, {"train_dir": "images"}])
def test_images(folder: Path, source: dict[str, str], streaming: bool) -> None:
    model = ViTForImageClassification.from_pretrained(folder / "vit")
    processor = ViTImageProcessor.from_pretrained(folder / "vit")
    given = {name: str(folder / value) for name, value in source.items()}
    args = UnlabelledArguments(**given, max_eval_samples=4, max_train_samples=8, streaming=streaming)
    rows = read_rows(model, processor, args, seed=0)
    batch = rows.collate([rows.held_out[0], rows.held_out[1]])
    assert list(batch) == ["pixel_values"]
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    assert len(rows.calibration) == 8
    if not streaming:
        assert len(rows.train) == 8


# -- mistakes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", ["--attention", "keep"], "--attention keep takes no settings"),
        ("gpt2", ["--attention", "softmax", "--attention_config", "{}"], "GPT2LMHeadModel has softmax attention"),
        ("gpt2", ["--attention_config", '{"learned": false}'], "learned=True"),
        ("gpt2", ["--max_length", "100"], "--max_length must be at most 64"),
        ("gpt2", ["--max_length", "8"], "fit into the window"),
        ("gpt2", ["--max_eval_samples", "1000"], "gives no rows of 40 tokens, beside the"),
        ("gpt2", ["--max_eval_samples", "0"], "--max_eval_samples must be at least 1"),
        ("gpt2", ["--train_dir", "images"], "--train_dir is of no use here: LinAttnGPT2LMHeadModel takes texts"),
        ("gpt2", ["--text_column", "label"], "Column 'label' has values that are not text"),
        ("gpt2", ["--text_column", "body"], "--text_column 'body' is not a column of the data"),
        ("gpt2", ["--train_file", "none.txt"], "'none.txt' does not exist"),
        ("gpt2", ["--transfer_layers", "7"], "7"),
        ("gpt2", ["--transfer_layers", "a"], "--transfer_layers must look like '0,1,4-5'"),
        ("gpt2", ["--second_stage_learning_rate", "1"], "needs --second_stage_steps"),
        ("gpt2", ["--second_stage_steps", "-1"], "--second_stage_steps must be at least 0"),
        (
            "gpt2",
            ["--second_stage_steps", "2", "--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps"],
            "follows from the step alone",
        ),
        ("gpt2", ["--train_sampling_strategy", "group_by_length"], "all rows have the same length"),
        ("gpt2", ["--streaming", "--max_steps", "-1", "--num_train_epochs", "2"], "nobody knows how many rows"),
        (
            "vit",
            ["--max_length", "8"],
            "--max_length is of no use here: LinAttnViTForImageClassification takes images",
        ),
        ("vit", ["--train_file", "text.jsonl"], "--train_file must be one of ['.parquet']"),
        ("vit", ["--image_column", "label"], "Column 'label' does not hold images"),
    ],
)
def test_mistakes_get_a_clear_error(
    folder: Path, tmp_path: Path, family: str, changes: list[str], message: str
) -> None:
    argv = arguments(folder, tmp_path / "out", family, "favor_plus", *changes)
    if "softmax" in changes:
        argv[argv.index("--attention_config") : argv.index("--attention_config") + 2] = []
    with pytest.raises((RecipeError, hf_linattn.errors.LinAttnError)) as error:
        transfer(argv)
    assert message in str(error.value)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("given", "message"), [([], "give --do_train"), (["--do_train", "--ablations"], "--ablations needs --do_eval")]
)
def test_what_is_to_be_done(folder: Path, tmp_path: Path, given: list[str], message: str) -> None:
    argv = [argument for argument in arguments(folder, tmp_path) if not argument.startswith("--do_")]
    with pytest.raises(RecipeError, match=message):
        transfer([*argv, *given])


def test_epochs_in_place_of_steps(folder: Path, tmp_path: Path) -> None:
    argv = arguments(folder, tmp_path, "gpt2", "favor_plus", "--max_steps", "-1", "--num_train_epochs", "1")
    found = transfer([*argv, "--max_train_samples", "10"])
    assert found["transfer"]["first_stage_steps"] == 3
