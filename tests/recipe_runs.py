"""Runs of a recipe on a tiny model that can be cut short at a step.

As a program (of several processes): `recipe_runs.py RECORD STEP ARGUMENTS...`, with step 0 for the whole run; what
each rank was fed goes to RECORD-rank.json.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import in_processes
from forked_programs import run_forked
from hub_server import environment
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

import evaluate_checkpoint
import text_classification
from recipes.local_hub import LocalHub
from scripts.kill_parts.inputs import SETTINGS

ROWS = 24
STEPS_PER_EPOCH = 6  # of 4 rows
# As `python RECIPE ARGUMENTS...`, and then goes on.
RUN = """
import os, runpy, sys
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
INPUTS = ("input_ids", "pixel_values")


class CutError(Exception):
    """Ends a run as a kill would: nothing is written after it."""


class CutAfter(TrainerCallback):
    """Cut the run after a step, before that step is saved, and record what the model was fed."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.seen: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def record(module: Any, inputs: Any, arguments: dict[str, Any]) -> None:
            if module.training:
                self.seen += next(arguments[name] for name in INPUTS if name in arguments).tolist()

        model.register_forward_pre_hook(record, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise CutError


def arguments(folder: Path, output: Path, kind: str = "favor_plus", *changes: str) -> list[str]:
    """The command line of two epochs of six steps, saved every second step."""
    values: dict[str, Any] = {
        "model_name_or_path": folder / "model",
        "attention": kind,
        "train_file": folder / "data.jsonl",
        "validation_file": folder / "data.jsonl",
        "output_dir": output,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "eval_strategy": "epoch",
        "learning_rate": 1e-2,
        "disable_tqdm": "true",
        "report_to": "none",
    }
    if kind in SETTINGS:
        values["attention_config"] = json.dumps(SETTINGS[kind])
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [*flags, "--do_train", "--do_eval", *changes]


def train(
    argv: Sequence[str], cut_after: int | None = None, main: Callable[..., Any] = text_classification.main
) -> CutAfter:
    """Run a recipe; with `cut_after`, until that step."""
    callback = CutAfter(cut_after)
    if cut_after is None:
        main(argv, [callback])
    else:
        with pytest.raises(CutError):
            main(argv, [callback])
    return callback


def two_processes(main: Callable[..., Any], argv: Sequence[str], folder: Path) -> None:
    """Run a recipe's `main` in two forked processes, with the variables of a launcher.

    What `accelerate launch` itself does to a recipe is seen in tests/recipes/test_slurm.py.
    """
    in_processes(folder, 2, _run, main, argv, launched=True)


def _run(main: Callable[..., Any], argv: Sequence[str]) -> dict[str, Tensor]:
    main(argv)
    return {}


@contextlib.contextmanager
def forked_measurements(after: int = 0) -> Iterator[None]:
    """`evaluate_checkpoint.py` forks the processes that it measures in, instead of starting new interpreters.

    Args:
        after: So many it starts as it does.
    """
    with pytest.MonkeyPatch.context() as patch:
        started = itertools.count()
        fork = SimpleNamespace(
            get_context=lambda method: multiprocessing.get_context(method if next(started) < after else "fork")
        )
        patch.setattr(evaluate_checkpoint, "multiprocessing", fork)
        yield


def pushed(recipe: str, argv: Sequence[str], home: Path, code: str) -> tuple[set[str], str]:
    """Run a recipe as a program that pushes `local/it` to a Hub, then `code` with that Hub, in one process.

    Returns: The files of the repository and its model card.
    """
    with LocalHub() as hub:
        env = environment(**hub.environment(home), HF_HUB_OFFLINE="0")
        program = [recipe, *argv, "--push_to_hub", "--hub_model_id", "local/it"]
        run_forked(["-c", RUN + code, *program], env)
    repo = hub.repos["local/it"]
    files = repo.commits[repo.branches["main"]]
    return set(files), hub.blobs[files["README.md"]].decode()


def assert_mistake(
    main: Callable[..., Any], argv: Sequence[str], message: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe tells what is wrong in one line, ends with status 2, and writes nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sys.modules["parts.common"].run(lambda: main(argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error, error
    assert not output.exists()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Bit by bit."""
    one, two = weights(ours), weights(theirs)
    assert one.keys() == two.keys()
    off = {name: float((one[name] - two[name]).abs().max()) for name in one if not torch.equal(one[name], two[name])}
    assert not off, f"largest differences: {off}"


if __name__ == "__main__":
    callback = CutAfter(int(sys.argv[2]) or None)
    try:
        text_classification.main(sys.argv[3:], [callback])
    except CutError:
        pass
    Path(f"{sys.argv[1]}-{os.environ['RANK']}.json").write_text(json.dumps(callback.seen))
    torch.distributed.destroy_process_group()
    gc.collect()  # the trainer, which refers to itself and to the group: its threads end
