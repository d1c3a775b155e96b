"""Signals: what a run does that is told to stop, by a scheduler or by Ctrl-C."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from recipe_groups import Groups
from transformers import TrainerCallback

import text_classification
from parts.stopping import SaveOnSignal

INT, TERM = signal.SIGINT, signal.SIGTERM
RECIPE = "text_classification"


class Sends(TrainerCallback):
    """Sends a signal to its own process, in a step, or in an evaluation."""

    def __init__(self, number: int, step: int, in_evaluation: bool = False, times: int = 1) -> None:
        self.number, self.step, self.in_evaluation, self.times = number, step, in_evaluation, times

    def send(self) -> None:
        for _ in range(self.times):
            os.kill(os.getpid(), self.number)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.in_evaluation and state.global_step + 1 == self.step:
            self.send()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.in_evaluation and state.global_step == self.step:
            self.in_evaluation = False
            self.send()


def sending(rank: int, *given: Any, **options: Any) -> Any:
    """The recipe, with a signal to one of its processes."""

    def main(argv: list[str], callbacks: list[TrainerCallback]) -> Any:
        sends = [Sends(*given, **options)] if os.environ["RANK"] == str(rank) else []
        return text_classification.main(argv, [*sends, *callbacks])

    return main


@pytest.mark.parametrize(
    ("number", "processes", "flag"),
    [
        (INT, 2, "false"),
        pytest.param(TERM, 2, "true", marks=pytest.mark.slow),
        pytest.param(INT, 1, "true", marks=pytest.mark.slow),
        pytest.param(TERM, 1, "true", marks=pytest.mark.slow),
    ],
)
def test_the_step_is_saved_on_all_processes(
    groups: Groups, tmp_path: Path, number: int, processes: int, flag: str
) -> None:
    """Only the last process gets the signal, at the beginning of a step that is not one to save."""
    main = sending(processes - 1, number, 3)
    ended = groups.run(RECIPE, tmp_path, "--enable_jit_checkpoint", flag, main=main, processes=processes)
    assert ended.statuses == [128 + number] * processes, "\n".join(ended.logs)
    output = tmp_path / "output"
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert not (output / "model.safetensors").exists()
    assert f"{signal.Signals(number).name}: stopped after step 3 of" in ended.log
    assert "Traceback" not in "".join(ended.logs)
    again = groups.assert_goes_on(RECIPE, tmp_path, processes=processes)
    assert again.matching(r"Resuming from \S*/(checkpoint-\d+)") == ["checkpoint-3"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [INT, TERM])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_is_left(groups: Groups, tmp_path: Path, number: int, processes: int) -> None:
    step = 6 // processes  # the end of an epoch
    main = sending(processes - 1, number, step, in_evaluation=True)
    ended = groups.run(RECIPE, tmp_path, main=main, processes=processes)
    assert ended.statuses == [128 + number] * processes, "\n".join(ended.logs)
    assert "eval_loss" not in ended.log
    again = groups.assert_goes_on(RECIPE, tmp_path, processes=processes)
    assert again.matching(r"Resuming from \S*/(checkpoint-\d+)") == [f"checkpoint-{step}"]


BEST = ("--load_best_model_at_end", "true", "--save_strategy", "epoch", "--metric_for_best_model", "accuracy")


@pytest.mark.slow
def test_no_evaluation_is_missed_that_decides_which_model_is_best(groups: Groups, tmp_path: Path) -> None:
    """A checkpoint without its metrics is not written: the run goes on from an earlier one, here from none."""
    main = sending(0, INT, 6, in_evaluation=True)
    ended = groups.run(RECIPE, tmp_path, *BEST, main=main, processes=1)
    assert ended.statuses == [130]
    assert not list((tmp_path / "output").glob("checkpoint-*"))
    groups.assert_goes_on(RECIPE, tmp_path, *BEST, processes=1)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(groups: Groups, tmp_path: Path) -> None:
    ended = groups.run(RECIPE, tmp_path, main=sending(0, INT, 3, times=2), processes=1)
    assert ended.statuses == [130]
    assert {path.name for path in (tmp_path / "output").glob("checkpoint-*")} == {"checkpoint-2"}
    groups.assert_goes_on(RECIPE, tmp_path, processes=1)


def hung(number: int, times: int) -> Any:
    """The recipe; its second process stands still, with its connections open, and the first waits for it."""

    def main(argv: list[str], callbacks: list[TrainerCallback]) -> Any:
        SaveOnSignal.PATIENCE = 0.5
        sends = Sends(signal.SIGSTOP, 3)
        if os.environ["RANK"] == "0":
            sends = Sends(0, 3)
            parent = os.getpid()

            def send() -> None:  # from outside, when the process has been waiting for a while
                if os.fork() == 0:
                    for _ in range(times):
                        time.sleep(1)
                        os.kill(parent, number)
                    os._exit(0)

            sends.send = send  # type: ignore[method-assign]
        return text_classification.main(argv, [sends, *callbacks])

    return main


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(INT, 2), (TERM, 1)])
def test_a_process_that_waits_for_one_that_hangs(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, times: int
) -> None:
    monkeypatch.setattr("scripts.kill_parts.groups.GRACE", 2.0)  # the hanging one is killed
    ended = groups.run(RECIPE, tmp_path, main=hung(number, times))
    assert ended.statuses == [128 + number, -9], "\n".join(ended.logs)
    assert {path.name for path in (tmp_path / "output").glob("checkpoint-*")} == {"checkpoint-2"}
    groups.assert_goes_on(RECIPE, tmp_path)


@pytest.mark.slow
def test_workers_of_the_data_loader_live_on(groups: Groups, tmp_path: Path) -> None:
    """Ctrl-C in a shell reaches them too."""

    class ToAll(Sends):
        def send(self) -> None:
            os.killpg(0, INT)

    def main(argv: list[str], callbacks: list[TrainerCallback]) -> Any:
        os.setpgid(0, 0)
        return text_classification.main(argv, [ToAll(INT, 3), *callbacks])

    workers = ("--dataloader_num_workers", "2")
    ended = groups.run(RECIPE, tmp_path, *workers, main=main, processes=1)
    assert ended.statuses == [130], "\n".join(ended.logs)
    assert (tmp_path / "output" / "checkpoint-3").is_dir()
    groups.assert_goes_on(RECIPE, tmp_path, *workers, processes=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "changes", "status"),
    [
        (INT, ("--save_strategy", "no", "--enable_jit_checkpoint", "false"), 130),  # nothing is to be saved
        (TERM, ("--enable_jit_checkpoint", "false"), -TERM),
    ],
)
def test_without_anything_to_save_a_run_ends_at_once(
    groups: Groups, tmp_path: Path, number: int, changes: tuple[str, ...], status: int
) -> None:
    ended = groups.run(RECIPE, tmp_path, *changes, main=sending(0, number, 3), processes=1)
    assert ended.statuses == [status]
    assert not (tmp_path / "output" / "checkpoint-3").exists()
    assert "Traceback" not in ended.log


@pytest.mark.slow
def test_attention_transfer_is_saved_too(groups: Groups, tmp_path: Path) -> None:
    ended = groups.run("image_classification", tmp_path, signals=("transfer step 3", TERM))
    assert ended.statuses == [143, 143], "\n".join(ended.logs)
    again = groups.assert_goes_on("image_classification", tmp_path)
    assert again.matching(r"Attention transfer goes on from \S*/(checkpoint-\d+)") in (
        ["checkpoint-3"],
        ["checkpoint-2"],
    )
