"""Trainers and recipes under Accelerate's FSDP2, two processes: the run of one with the same batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import torch
from accelerated import as_launched
from processes import run
from recipe_runs import arguments
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

import attention_transfer
import text_classification
from hf_linattn.modules.base import LinearAttention
from parts import adaptation
from scripts.kill_parts.inputs import build

LEARNED = {"learned": True, "num_features": 16, "window_size": 4}


class Look(TrainerCallback):
    """What the model of a run is, and which dtypes its learned maps have where they are used."""

    def __init__(self, is_sharded: bool) -> None:
        self.is_sharded = is_sharded
        self.dtypes: set[torch.dtype] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers = [module for module in model.modules() if isinstance(module, LinearAttention)]
        for layer in layers:
            layer.register_forward_pre_hook(self.look)
        assert isinstance(model, FSDPModule) == self.is_sharded
        assert all(isinstance(layer, FSDPModule) == self.is_sharded for layer in layers)

    def look(self, layer: Any, _: Any) -> None:
        self.dtypes |= {tensor.dtype for tensor in layer.tensors().values()}


def work(argv: list[str], config: str | None) -> dict[str, Tensor]:
    """Run the recipe. Returns the losses of training, of transfer, and whether all tensors were float32."""
    is_sharded = config == "fsdp2.yaml"
    if config is not None:
        as_launched(config)
    if is_sharded:
        adaptation.strategy = lambda training: "FSDP2"  # the device says something else
    look = Look(is_sharded)
    found = text_classification.main(argv, [look])
    losses = [entry["loss"] for entry in found["log"] if "loss" in entry]
    transfer = found["adaptation"].get("transfer", {}).get("error", 0.0)
    return {
        "losses": torch.tensor(losses),
        "scores": torch.tensor([found["metrics"]["eval"]["eval_loss"], found["metrics"]["eval"]["eval_accuracy"]]),
        "transfer": torch.tensor(transfer),
        "float32": torch.tensor(look.dtypes == {torch.float32}),
    }


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    build(tmp_path, 26)  # so that the last batches are not full

    def line(output: str, rows: int, *changes: str) -> list[str]:
        flags = ["--per_device_train_batch_size", str(rows), "--logging_steps", "1", "--eval_strategy", "no"]
        flags += ["--attention_config", json.dumps(LEARNED), "--train_sampling_strategy", "random"]
        return arguments(tmp_path, tmp_path / output, "favor_plus", *flags, *changes)

    return line


@pytest.mark.parametrize("config", [pytest.param("ddp.yaml", marks=pytest.mark.slow), "fsdp2.yaml"])
def test_a_recipe_is_that_of_one_process(tmp_path: Path, command: Callable[..., list[str]], config: str) -> None:
    """Transfer before fine-tuning, saved, resumed; every row of the evaluation counted once."""
    steps = ["--max_steps", "5", "--save_steps", "3", "--transfer_steps", "2"]
    no_dropout = json.loads((tmp_path / "model" / "config.json").read_text())
    no_dropout |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(no_dropout))
    (expected,) = run(tmp_path / "a", 1, work, command("one", 4, *steps), None)
    for found in run(tmp_path / "b", 2, work, command("two", 2, *steps), config):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-4)


def test_with_bfloat16_learned_maps_stay_float32(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    """In transfer, which would raise otherwise, and in fine-tuning. Accelerate gives all units one policy."""
    steps = ["--max_steps", "1", "--save_strategy", "no", "--transfer_steps", "1", "--bf16", "true"]
    for found in run(tmp_path / "b", 2, work, command("two", 2, *steps), "fsdp2.yaml"):
        assert found["float32"]
    assert load_file(tmp_path / "two" / "model.safetensors")["classifier.weight"].dtype == torch.float32


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    steps = ["--max_steps", "5", "--save_steps", "3", "--transfer_steps", "2"]
    run(tmp_path / "b", 2, work, command("two", 2, *steps), "fsdp2.yaml")
    whole = load_file(tmp_path / "two" / "model.safetensors")
    shutil.rmtree(tmp_path / "two" / "checkpoint-5")
    (tmp_path / "two" / "model.safetensors").unlink()
    run(tmp_path / "b", 2, work, command("two", 2, *steps), "fsdp2.yaml")
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def work_transfer(argv: list[str], config: str | None) -> dict[str, Tensor]:
    """Run the recipe of attention transfer. Returns what it logs and compares."""
    if config is not None:
        as_launched(config)
        attention_transfer.strategy = adaptation.strategy = lambda training: "FSDP2"
    found = attention_transfer.main(argv, [])
    fidelity = [report["mean_layer_error"] for report in found["fidelity"].values()]  # of the first process
    errors = [entry["error"] for entry in found["log"] if "error" in entry]
    return {"errors": torch.tensor(errors), "fidelity": torch.tensor(fidelity or [0.0, 0.0])}


@pytest.mark.slow
def test_attention_transfer_in_two_stages(tmp_path: Path) -> None:
    """One process compares, with a whole model."""
    tiny_checkpoints.build(tmp_path)
    values = {
        "model_name_or_path": tmp_path / "gpt2",
        "attention": "favor_plus",
        "attention_config": json.dumps({"learned": True, "num_features": 8, "window_size": 8}),
        "train_file": tmp_path / "text.jsonl",
        "max_steps": 4,
        "second_stage_steps": 2,
        "max_length": 40,
        "max_eval_samples": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "disable_tqdm": "true",
        "report_to": "none",
    }
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    flags += ["--do_train", "--do_eval", "--per_device_train_batch_size"]
    lines = {name: [*flags, rows, "--output_dir", str(tmp_path / name)] for name, rows in (("one", "4"), ("two", "2"))}
    (expected,) = run(tmp_path / "a", 1, work_transfer, lines["one"], None)
    first, second = run(tmp_path / "b", 2, work_transfer, lines["two"], "fsdp2.yaml")
    torch.testing.assert_close(first["errors"], expected["errors"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second["errors"], expected["errors"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["fidelity"], expected["fidelity"], rtol=1e-4, atol=1e-5)
    assert first["fidelity"][1] < first["fidelity"][0]
