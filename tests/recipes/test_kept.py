"""What comes before training is done once, however often a run is killed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recipe_runs import ROWS, CutError, arguments, assert_same_weights, train

from parts import adaptation
from parts.kept import Kept
from scripts.kill_parts.inputs import build

TRANSFER = ("--transfer_steps", "5", "--attention_config", '{"window_size": 2}', "--save_steps", "2")
CALIBRATED = ("--attention_config", '{"window_size": 4, "num_features": 16, "statistics": "calibrated"}')
LORA = ("--lora_target_modules", "query,value")
KEPT = "_before_training"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept")
    build(path, ROWS)
    return path


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts rows that are read for calibration, and steps of attention transfer."""
    counted = {"calibrations": 0, "steps": 0}
    calibrate, step = adaptation.hf_linattn.calibrate, adaptation._Transfer.training_step

    def calibrating(*args: Any, **kwargs: Any) -> Any:
        counted["calibrations"] += 1
        return calibrate(*args, **kwargs)

    def stepping(*args: Any, **kwargs: Any) -> Any:
        counted["steps"] += 1
        if counted["steps"] == counted.get("cut"):
            raise CutError
        return step(*args, **kwargs)

    monkeypatch.setattr(adaptation.hf_linattn, "calibrate", calibrating)
    monkeypatch.setattr(adaptation._Transfer, "training_step", stepping)
    return counted


@pytest.mark.parametrize(
    ("changes", "cut", "expected"),
    [
        (TRANSFER, 4, (1, 3)),  # in the fourth step of transfer: goes on from the second
        pytest.param(CALIBRATED, None, (1, 0), marks=pytest.mark.slow),  # in training, before it saved
        pytest.param(TRANSFER, None, (1, 0), marks=pytest.mark.slow),
        pytest.param((*TRANSFER, *LORA), None, (1, 0), marks=pytest.mark.slow),
        pytest.param((*TRANSFER, *LORA, "--streaming", "--max_steps", "6"), 4, (1, 3), marks=pytest.mark.slow),
    ],
)
def test_what_was_done_is_not_done_again(
    folder: Path, tmp_path: Path, passes: dict[str, int], changes: tuple[str, ...], cut: int | None, expected: Any
) -> None:
    train(arguments(folder, tmp_path / "whole", "favor_sharp", *changes))
    assert not (tmp_path / "whole" / KEPT).exists()
    argv = arguments(folder, tmp_path / "cut", "favor_sharp", *changes)
    passes |= {"calibrations": 0, "steps": 0, **({"cut": cut} if cut else {})}
    if cut:
        with pytest.raises(CutError):
            train(argv)
    else:
        train(argv, cut_after=1)
    before = passes["steps"]
    passes.pop("cut", None)
    train(argv)
    assert (passes["calibrations"], passes["steps"] - before) == expected
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut"))
    assert two["adaptation"].keys() == one["adaptation"].keys()
    assert two["adaptation"].get("calibration_rows") == one["adaptation"].get("calibration_rows")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("--calibration_samples", "8"), "(calibration_samples)"),
        (("--from_scratch",), ""),
        (("--seed", "1"), "(seed)"),
    ],
)
def test_other_flags_begin_anew(
    folder: Path,
    tmp_path: Path,
    passes: dict[str, int],
    changes: list[str],
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "hf_linattn.recipes")
    train(arguments(folder, tmp_path / "whole", "favor_sharp", *TRANSFER, *changes))
    train(arguments(folder, tmp_path / "cut", "favor_sharp", *TRANSFER), cut_after=1)
    passes |= {"calibrations": 0, "steps": 0}
    train(arguments(folder, tmp_path / "cut", "favor_sharp", *TRANSFER, *changes))
    assert (passes["calibrations"], passes["steps"]) == (1, 5)
    assert ("Calibration and attention transfer begin anew" in caplog.text) == bool(told)
    assert told in caplog.text
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(("is_needed", "changed", "expected"), [(False, 1, 8), (True, 1, None), (False, 2, None)])
def test_what_was_done_is_told_on_another_number_of_processes(
    tmp_path: Path, is_needed: bool, changed: int, expected: int | None
) -> None:
    """A run that goes on from a checkpoint with fewer rows in a batch; without one it would be done anew."""
    flags = {"per_device_train_batch_size": 4, "seed": 0}
    training: Any = SimpleNamespace(output_dir=tmp_path, world_size=1, process_index=0, should_save=True)
    Kept(training, flags, from_scratch=False).record({"calibration_rows": 8})
    now = {name: value + 1 if number < changed else value for number, (name, value) in enumerate(flags.items())}
    assert Kept(training, now, False, is_needed).done.get("calibration_rows") == expected


@pytest.mark.slow
def test_a_damaged_calibration_is_told(
    folder: Path, tmp_path: Path, passes: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    train(arguments(folder, tmp_path, "favor_sharp", *CALIBRATED), cut_after=1)
    path = tmp_path / KEPT / "calibration.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    train(arguments(folder, tmp_path, "favor_sharp", *CALIBRATED))
    assert passes["calibrations"] == 2
    assert "Calibrating anew" in caplog.text
