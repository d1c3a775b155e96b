"""`hf-linattn calibrate`, `transfer` and `compare` on tiny checkpoints of every family."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import KINDS
from forked_programs import run_forked
from hub_server import environment
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from shell import shell, told
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_linattn
from hf_linattn.modules.registry import get_kind

LENGTH = 40
SHORT = ["--max-length", str(LENGTH)]


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors that are others now."""
    one, two = (load_file(path / "model.safetensors") for path in (before, after))
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(one[name], two[name])}


# -- calibrate --------------------------------------------------------------------------------------------------------
def test_calibrate(folder: Path, tmp_path: Path) -> None:
    """The same statistics as the library's function has from the same rows."""
    found = told("calibrate", folder / "sharp", tmp_path, "--inputs", folder / "text.txt", "--rows", "6", *SHORT)
    assert found["kind"] == "favor_sharp"
    assert found["data"] == "text.txt"
    assert found["tokens"] == 6 * LENGTH

    text = (folder / "text.txt").read_text() + "\n"
    ids = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"][: 6 * LENGTH]
    model = AutoModelForCausalLM.from_pretrained(folder / "sharp")
    hf_linattn.calibrate(model, [{"input_ids": torch.tensor(ids).reshape(6, LENGTH)}])
    saved = load_file(tmp_path / "model.safetensors")
    for name, value in model.state_dict().items():
        if ".linattn." in name:
            torch.testing.assert_close(saved[name], value, msg=name)
    assert not hf_linattn.needs_calibration(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_card_of_ones_own_is_kept(folder: Path, tmp_path: Path) -> None:
    shell("convert", folder / "gpt2", tmp_path / "in", "--kind", "lara")
    (tmp_path / "in" / "README.md").write_text("# Mine\n")
    shell("calibrate", tmp_path / "in", tmp_path / "out", "--inputs", folder / "text.jsonl", *SHORT)
    assert "# Mine" in (tmp_path / "out" / "README.md").read_text()


# -- transfer ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "kind"), [("gpt2", "favor_plus"), ("bert-classifier", "lara"), ("vit", "eva")])
def test_the_three_commands_in_a_row(folder: Path, tmp_path: Path, family: str, kind: str) -> None:
    is_image = family == "vit"
    data = ["--inputs", folder / ("images" if is_image else "text.jsonl"), *([] if is_image else SHORT)]
    first, second, third = (tmp_path / name for name in ("converted", "calibrated", "trained"))
    window = f"window_size={2 if is_image else 8}"
    shell("convert", folder / family, first, "--kind", kind, "--learned", "--set", window, "--base-model", "some/base")
    if get_kind(kind).calibrated_field:
        shell("calibrate", first, second, *data)
    else:
        second = first
    result = shell("transfer", second, third, *data, "--steps", "6", "--held-out", "6", "--ablations")
    assert "not trained on" in result.stdout
    assert f"Saved to {third} with a model card" in result.stdout
    moved = changed(second, third)
    assert moved
    assert all(".linattn." in name for name in moved)
    card = ModelCard.load(third / "README.md")
    assert card.data.base_model == "some/base"
    unit = "images" if is_image else f"rows of {LENGTH} tokens"
    assert f"| steps | 6, of 4 {unit} each |" in card.text
    assert "| **after transfer** |" in card.text
    assert "| slots shuffled |" in card.text

    compared = told("compare", third, *data, "--rows", "6")
    assert f"{compared['layers'][0]['error']:.3f}" in result.stdout
    assert compared["rows"] == 6


def test_what_transfer_tells_as_json(folder: Path, tmp_path: Path) -> None:
    flags = ["--steps", "3", "--second-stage", "2", "--held-out", "5", "--layers", "1", "--data-name", "Some texts"]
    found = told("transfer", folder / "favor", tmp_path, "--inputs", folder / "text.txt", *SHORT, *flags)
    assert (found["steps"], found["second_stage"], found["data"]) == (3, 2, "Some texts")
    assert [layer["layer"] for layer in found["layers"]] == [1]
    assert 0 < found["layers"][0]["last_step"]
    assert found["before"]["rows"] == found["after"]["rows"] == 5
    assert found["after"]["layers"][1]["error"] != found["before"]["layers"][1]["error"]
    assert all(".1.attn.linattn." in name for name in changed(folder / "favor", tmp_path))
    assert "| second stage | 2 steps more" in ModelCard.load(tmp_path / "README.md").text


def test_without_held_out_rows(folder: Path, tmp_path: Path) -> None:
    data = ["--inputs", folder / "text.txt", *SHORT]
    text = shell("transfer", folder / "favor", tmp_path, *data, "--steps", "2", "--held-out", "0").stdout
    assert "in the first and in the last step" in text
    assert "| **after transfer** |" not in ModelCard.load(tmp_path / "README.md").text


def test_held_out_rows_are_not_trained_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[tuple[int, ...]]] = {"compare": set(), "transfer": set()}

    def recorded(name: str, function):
        def call(model, batches, **options):
            def read():
                for batch in batches:
                    seen[name].update(map(tuple, batch["input_ids"].tolist()))
                    yield batch

            return function(model, read(), **options)

        return call

    from hf_linattn.cli import transfer as command

    monkeypatch.setattr(command, "compare_model", recorded("compare", command.compare_model))
    monkeypatch.setattr(command, "transfer_attention", recorded("transfer", command.transfer_attention))
    flags = ["--steps", "60", "--second-stage", "1", "--held-out", "7"]
    shell("transfer", folder / "favor", tmp_path, "--inputs", folder / "text.txt", *SHORT, *flags)
    assert len(seen["compare"]) == 7
    assert len(seen["transfer"]) > 20
    assert not seen["compare"] & seen["transfer"]


def test_in_half_precision_and_from_the_checkpoints_own(folder: Path, tmp_path: Path) -> None:
    flags = ["--kind", "favor_plus", "--learned", "--set", "window_size=8"]
    shell("convert", folder / "gpt2", tmp_path / "half", *flags, "--dtype", "bfloat16")
    data = ["--inputs", folder / "text.txt", *SHORT, "--steps", "1", "--held-out", "0"]
    shell("transfer", tmp_path / "half", tmp_path / "full", *data)
    dtypes = [AutoConfig.from_pretrained(tmp_path / name).dtype for name in ("half", "full")]
    assert dtypes == [torch.bfloat16, torch.float32]


# -- compare ----------------------------------------------------------------------------------------------------------
def test_compare_with_everything(folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / "heads.png"
    flags = ["--rows", "5", "--ablations", "--heads", "--plot", plot]
    result = shell("compare", folder / "favor", "--inputs", folder / "text.txt", *SHORT, *flags)
    for said in ("| layer | error |", "| window alone |", "| error | 0 | 1 | 2 | 3 |", "| rows | 5 |"):
        assert said in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"written: {plot}" in result.stderr


def test_texts_one_by_one(folder: Path) -> None:
    """Every text is a row, padded; of packed ones there are fewer."""
    lengths = [len(text.split()) for text in (folder / "text.txt").read_text().splitlines()]
    data = ["--inputs", folder / "text.txt", *SHORT, "--rows", "1000"]
    found = told("compare", folder / "favor", *data, "--no-pack")
    assert found["rows"] == len(lengths)
    assert found["tokens"] == sum(min(length, LENGTH) for length in lengths)
    assert told("compare", folder / "favor", *data)["rows"] == sum(lengths) // LENGTH


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_model_without_conversion(folder: Path, kind: str) -> None:
    settings = {"window_size": 4, **get_kind(kind).example}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    found = told("compare", folder / "bert", "--inputs", folder / "text.txt", *SHORT, "--kind", kind, *flags)
    assert found["kind"] == kind
    assert 0 < found["mean_layer_error"] < 2


# -- as a program -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "status"), [("favor_plus", 0), ("favour_plus", 2)])
def test_as_a_program(folder: Path, tmp_path: Path, kind: str, status: int) -> None:
    """stdout is JSON or nothing, whatever is said beside it; a mistake is one line and leaves nothing."""
    command = ["-m", "hf_linattn.cli", "convert", "gpt2", str(tmp_path / "out"), "--kind", kind, "--json"]
    if status:
        options = {"text": True, "capture_output": True, "timeout": 120}
        done = subprocess.run([sys.executable, *command], env=environment(), cwd=folder, **options)
    else:
        done = run_forked(command, environment(), check=False, timeout=120, cwd=folder)
    assert done.returncode == status, done.stderr
    if status:
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: Unknown attention kind 'favour_plus'")
        assert not (tmp_path / "out").exists()
    else:
        assert json.loads(done.stdout)["kind"] == kind
