"""The check against the Hub: its rehearsal, and that it sees what it is there to see."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub_server import ROOT, environment, run
from safetensors.torch import load

sys.path.append(str(ROOT / "scripts"))

from hub_parts import models, steps  # noqa: E402
from hub_parts.small_checkpoints import small_checkpoints  # noqa: E402
from hub_parts.weights import check_weights  # noqa: E402

SCRIPT = str(ROOT / "scripts" / "hub_check.py")


def rehearse(folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, results and table of a rehearsal."""
    path = folder / "results.json"
    done = run([SCRIPT, "--rehearse", "--json", str(path), *options], environment(), check=False, timeout=800)
    assert path.exists(), done.stderr[-3000:]
    return done.returncode, json.loads(path.read_text()), path.with_suffix(".md").read_text()


def status(results: dict[str, Any]) -> dict[str, str]:
    return {part["part"]: part["status"] for part in results["parts"]}


@pytest.mark.hub
def test_a_failing_part_is_recorded_and_the_rest_done(tmp_path: Path) -> None:
    options = ("--models", "bert", "--kinds", "lara,eva", "--steps", "8", "--fail", "bert/lara/convert")
    code, results, table = rehearse(tmp_path, *options)

    assert code == 1
    assert results["rehearsal"] is True
    assert results["title"].startswith("Rehearsal")
    assert results["complete"]
    assert status(results) == {
        "bert/load": "ok",
        "bert/lara/native": "ok",
        "bert/lara/convert": "failed",
        **{f"bert/lara/{step}": "skipped" for step in ("direct", "compare", "train", "push", "reload", "delete")},
        **{
            f"bert/eva/{step}": "ok"
            for step in ("native", "convert", "direct", "compare", "train", "push", "reload", "delete")
        },
    }
    parts = {part["part"]: part for part in results["parts"]}
    failed = parts["bert/lara/convert"]
    assert failed["on_purpose"]
    assert failed["error"] == "OnPurpose: made to fail on purpose"
    assert failed["traceback"][0].startswith("Traceback")
    assert parts["bert/load"]["values"]["old_names"] == 12
    assert len(parts["bert/eva/train"]["values"]["losses"]) == 8
    (name,) = results["repositories"]["made"]
    assert name.startswith("local/hf-linattn-check-")
    assert results["repositories"]["deleted"] == [name]
    assert results["left_behind"] == {}

    assert table.startswith("# Rehearsal")
    assert "**A rehearsal**" in table
    assert "| bert/lara | ok | **failed** (on purpose) | skipped: needs convert |" in table
    for text in (table, json.dumps(results)):
        assert str(ROOT) not in text  # results are made to be shown around


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_models_and_kinds(tmp_path: Path) -> None:
    code, results, _ = rehearse(tmp_path, "--fail", "vit/eva/push")

    found = status(results)
    assert len(found) == 3 + 3 * 4 * 8
    assert found.pop("vit/eva/push") == "failed"
    assert found.pop("vit/eva/reload") == "skipped"
    assert found.pop("gpt2/lara/native") == "refused"
    assert set(found.values()) == {"ok"}, [part for part in results["parts"] if "traceback" in part]
    assert code == 1
    assert len(results["repositories"]["made"]) == 12  # one of them by the push that was made to fail, and deleted
    assert results["repositories"]["left"] == []


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_deletes_what_it_made(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = [sys.executable, SCRIPT, "--rehearse", "--models", "bert", "--kinds", "eva", "--json", str(path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (path.exists() and status(json.loads(path.read_text())).get("bert/eva/reload") == "running"):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) not in (0, 1)
    finally:
        process.kill()
    results = json.loads(path.read_text())
    assert not results["complete"]
    assert status(results)["bert/eva/reload"] == "interrupted"
    assert len(results["repositories"]["made"]) == 1
    assert results["repositories"]["left"] == []
    assert "cut short" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"HF_HUB_OFFLINE": "0"}, "There is no token"),
        ({"HF_HUB_OFFLINE": "0", "HF_TOKEN": "x", "HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
        ({"HF_TOKEN": "x"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_without_the_hub_one_sentence(changes: dict[str, str], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    done = run([SCRIPT, "--json", str(path)], environment(HF_HOME=str(tmp_path), **changes), check=False)

    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
    assert not path.exists()


def test_a_part_that_does_not_exist_cannot_fail() -> None:
    done = run([SCRIPT, "--rehearse", "--fail", "bert/eva/none"], environment(COLUMNS="300"), check=False)

    assert done.returncode == 2
    assert "no such part" in done.stderr


# -- what the parts see ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoints() -> dict[str, dict[str, bytes]]:
    return small_checkpoints(models.sentences())


def test_layouts_are_the_old_ones(checkpoints: dict[str, dict[str, bytes]]) -> None:
    bert, gpt2, vit = (set(load(files["model.safetensors"])) for files in checkpoints.values())

    assert {"bert.embeddings.LayerNorm.gamma", "cls.predictions.transform.LayerNorm.beta"} <= bert
    assert not [name for name in bert if "LayerNorm.weight" in name]
    assert {"h.0.attn.bias", "h.0.attn.c_attn.weight", "wte.weight"} <= gpt2
    assert {"vit.encoder.layer.1.attention.attention.query.weight", "classifier.bias"} <= vit
    for files in checkpoints.values():
        assert not [name for name in files if name.endswith((".bin", ".pt"))]


@pytest.mark.parametrize("name", list(models.MODELS))
def test_a_fresh_weight_is_seen(name: str, checkpoints: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """For every weight: were it not taken from the file, `check_weights` would say so."""
    model = models.MODELS[name]
    for path, content in checkpoints[model.repo].items():
        (tmp_path / path).write_bytes(content)
    file = load(checkpoints[model.repo]["model.safetensors"])
    loaded = getattr(transformers, model.auto).from_pretrained(tmp_path)

    assert check_weights(loaded, file, model.is_unused) == len([key for key in file if not model.is_unused(key)])
    for weight in loaded.parameters():
        kept = weight.detach().clone()
        torch.nn.init.ones_(weight)
        with pytest.raises(AssertionError, match="not those of the file"):
            check_weights(loaded, file, model.is_unused)
        weight.data.copy_(kept)


def test_a_weight_that_got_lost_is_seen(checkpoints: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """Two weights of the model that equal one of the file: none is fresh, but one of the file has no place."""
    model = models.MODELS["gpt2"]
    for path, content in checkpoints[model.repo].items():
        (tmp_path / path).write_bytes(content)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    loaded.transformer.h[0].ln_1.weight.data.copy_(loaded.transformer.h[1].ln_1.weight)

    with pytest.raises(AssertionError, match=r"none of the model.* h\.0\.ln_1\.weight of the file"):
        check_weights(loaded, load(checkpoints[model.repo]["model.safetensors"]), model.is_unused)


def test_missing_and_left_over_weights_are_seen() -> None:
    model = models.MODELS["bert"]
    good: dict[str, Any] = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}
    steps.check_info({**good, "unexpected_keys": {"cls.seq_relationship.bias"}}, model)
    for bad in (
        {"missing_keys": {"bert.embeddings.LayerNorm.weight"}},
        {"unexpected_keys": {"bert.embeddings.LayerNorm.gamma"}},
        {"mismatched_keys": {("cls.predictions.bias", (1,), (2,))}},
    ):
        with pytest.raises(AssertionError):
            steps.check_info({**good, **bad}, model)


def test_outputs_of_softmax_are_not_those_of_a_kind() -> None:
    softmax = torch.randn(2, 5, 7)
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    padding = softmax.clone()
    padding[1, 3:] = 100  # what is computed there says nothing
    other = softmax + 0.1
    broken = other.clone()
    broken[0, 0, 0] = float("nan")

    assert steps.difference(other, softmax, {"attention_mask": mask}) > 0.01
    for logits in (softmax, padding, broken):
        with pytest.raises(AssertionError):
            steps.difference(logits, softmax, {"attention_mask": mask})


@pytest.mark.parametrize("losses", [[2.0, 1.9], [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, float("nan"), 1.0], [1.0] * 4])
def test_losses_that_do_not_fall(losses: list[float]) -> None:
    steps.check_losses([4.0, 3.0, 3.5, 1.0], steps=4)
    with pytest.raises(AssertionError):
        steps.check_losses(losses, steps=4)


@pytest.mark.parametrize("name", list(models.MODELS))
def test_inputs_are_the_same_every_time(name: str, checkpoints: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """And long enough for most keys to be outside of a window; texts of BERT are padded."""
    model = models.MODELS[name]
    for path, content in checkpoints[model.repo].items():
        (tmp_path / path).write_bytes(content)
    processor = getattr(transformers, model.processor).from_pretrained(tmp_path)
    batches = model.batches(processor, 2)
    for batch, again in zip(batches, model.batches(processor, 2), strict=True):
        assert all(torch.equal(tensor, again[key]) for key, tensor in batch.items())
    first, second = batches
    key = "pixel_values" if name == "vit" else "input_ids"
    assert not torch.equal(first[key], second[key])
    if name == "bert":
        assert first["attention_mask"].sum(1).tolist() == [256, 192, 128, 256]
        assert int((first["labels"] != -100).sum()) > 50
    if name != "vit":
        assert first["input_ids"].shape == (4, 256)
