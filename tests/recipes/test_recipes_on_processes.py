"""A recipe's run is the same on one process and on several, with the same rows in a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import image_runs
import pytest
import recipe_runs
import tiny_checkpoints
import torch
import transfer_recipe
from accelerated import as_launched
from forked import in_processes
from recipe_runs import CutAfter, CutError
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

import image_classification
import language_modeling
import text_classification
from scripts.kill_parts import inputs as texts

RANDOM: dict[str, dict[str, Any]] = {
    "favor_plus": {"slot_dropout": 0.3, "redraw_interval": 2},
    "favor_sharp": {"slot_dropout": 0.3, "redraw_interval": 2},
    "lara": {"slot_dropout": 0.3, "sample_noise": True},
    "eva": {"slot_dropout": 0.3, "sample_noise": True},
}
# Adam makes of rounding what it makes of gradients.
COMMON = ("--optim", "sgd", "--learning_rate", "0.05", "--logging_steps", "1", "--save_strategy", "no")
COMMON += ("--eval_strategy", "no")


class Run(NamedTuple):
    """A recipe, on a model of it, with a kind."""

    recipe: str
    family: str
    kind: str


class Cut(NamedTuple):
    """How the four rows of a step are cut. config: The Accelerate config of the launch; None for DDP without one."""

    processes: int
    accumulation: int = 1
    config: str | None = None

    def flags(self) -> list[str]:
        batch = 4 // self.processes // self.accumulation
        return [
            "--per_device_train_batch_size",
            str(batch),
            "--gradient_accumulation_steps",
            str(self.accumulation),
        ]


MAIN: dict[str, Callable[..., Any]] = {
    "text_classification": text_classification.main,
    "language_modeling": language_modeling.main,
    "image_classification": image_classification.main,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models without dropout of their own, whose numbers are those of the process."""
    path = tmp_path_factory.mktemp("processes")
    tiny_checkpoints.build(path)
    texts.build(path, recipe_runs.ROWS)
    for file in path.glob("*/config.json"):
        config = json.loads(file.read_text())
        file.write_text(json.dumps({name: 0.0 if is_dropout(name) else value for name, value in config.items()}))
    return path


def is_dropout(name: str) -> bool:
    return name in ("hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop")


def command_line(run: Run, folder: Path, output: Path) -> list[str]:
    if run.recipe == "text_classification":
        argv = recipe_runs.arguments(folder, output, run.kind)
        settings = {**texts.SETTINGS[run.kind], **RANDOM[run.kind]}
    elif run.recipe == "language_modeling":
        more = ["--validation_file", str(folder / "text.jsonl"), "--max_train_samples", "16"]
        argv = transfer_recipe.arguments(folder, output, run.family, run.kind, *more)
        settings = {"window_size": 8, **RANDOM[run.kind]}
    else:
        # What else is drawn of images is that of the process.
        argv = image_runs.arguments(folder, output, run.kind, "--horizontal_flip", "0", "--min_crop_area", "1")
        settings = {"window_size": 2, **RANDOM[run.kind]}
    return [*argv, "--attention_config", json.dumps(settings), *COMMON]


class IsSharded(TrainerCallback):
    """What is trained is sharded by FSDP2, and is not silently under DDP."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert isinstance(model, FSDPModule)


def train(recipe: str, argv: Sequence[str], cut_after: int | None, config: str | None) -> dict[str, Tensor]:
    """The loss of every step, a mean over all processes."""
    callbacks: list[TrainerCallback] = [CutAfter(cut_after)]
    if config is not None:
        as_launched(config)
        callbacks.append(IsSharded())
    try:
        log = MAIN[recipe](argv, callbacks)["log"]
    except CutError:
        return {"losses": torch.zeros(0)}
    return {"losses": torch.tensor([entry["loss"] for entry in log if "loss" in entry], dtype=torch.float64)}


def losses(run: Run, cut: Cut, folder: Path, output: Path, *changes: str, cut_after: int | None = None) -> Tensor:
    argv = [*command_line(run, folder, output), *cut.flags(), *changes]
    return in_processes(output, cut.processes, train, run.recipe, argv, cut_after, cut.config, launched=True)[0][
        "losses"
    ]


CASES = [
    (Run("text_classification", "bert", "lara"), Cut(2)),
    (Run("text_classification", "bert", "favor_plus"), Cut(4)),
    (Run("text_classification", "bert", "eva"), Cut(2, accumulation=2)),
    (Run("language_modeling", "gpt2", "eva"), Cut(2, accumulation=2)),
    (Run("language_modeling", "gpt2", "favor_sharp"), Cut(2)),
    (Run("language_modeling", "gpt2", "favor_plus"), Cut(4)),
    (Run("image_classification", "vit", "eva"), Cut(2)),
    (Run("image_classification", "vit", "lara"), Cut(2, accumulation=2)),
    (Run("text_classification", "bert", "eva"), Cut(2, config="fsdp2.yaml")),
    (Run("text_classification", "bert", "favor_sharp"), Cut(4, config="fsdp2.yaml")),
    (Run("language_modeling", "gpt2", "lara"), Cut(2, config="fsdp2.yaml")),
    (Run("language_modeling", "gpt2", "lara"), Cut(2)),
    (Run("language_modeling", "gpt2", "favor_plus"), Cut(4, config="fsdp2.yaml")),
    (Run("image_classification", "vit", "favor_plus"), Cut(2, config="fsdp2.yaml")),
    (Run("image_classification", "vit", "eva"), Cut(4, config="fsdp2.yaml")),
]


def identity(value: Any) -> str:
    return "-".join(str(part) for part in value)


@pytest.mark.parametrize(
    ("run", "cut"),
    [pytest.param(*case, marks=pytest.mark.slow if n else []) for n, case in enumerate(CASES)],
    ids=identity,
)
def test_losses_of_one_process(run: Run, cut: Cut, folder: Path, tmp_path: Path) -> None:
    whole = losses(run, Cut(1), folder, tmp_path / "whole")
    ours = losses(run, cut, folder, tmp_path / "cut")
    assert len(whole) >= 6
    assert float((whole - ours).abs().max()) < 1e-5
    assert float(whole.std()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("cut", [Cut(1), Cut(4)], ids=identity)
def test_resumed_on_another_number_of_processes(cut: Cut, folder: Path, tmp_path: Path) -> None:
    """Two processes are stopped in the second epoch; others go on by the same flags but for the rows in a batch."""
    run, saves = Run("text_classification", "bert", "lara"), ("--save_strategy", "steps", "--save_steps", "2")
    whole = losses(run, Cut(1), folder, tmp_path / "whole")
    losses(run, Cut(2), folder, tmp_path / "cut", *saves, cut_after=9)
    after = losses(run, cut, folder, tmp_path / "cut", *saves)
    assert float((whole - after).abs().max()) < 1e-5  # the log has the steps before the stop, too
    assert len(after) == len(whole)
