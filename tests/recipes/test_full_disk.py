"""A full disk, a folder that cannot be written: one clear error on all processes, and nothing that was saved is lost.

A small file system in memory is mounted at the output folder, and filled, or made read-only, when the run saves.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recipe_groups import RECIPES, Groups, contents
from transformers import Trainer

from parts.saving import CheckedSaves

ROOM = 20_000  # bytes that are left: less than any checkpoint of these runs takes
FILLER = "filler"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An output folder on a file system of its own, of 8 MB."""
    output = tmp_path / "output"
    output.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(output)], capture_output=True)
    if done.returncode:
        pytest.skip("needs the right to mount a file system")
    yield output
    subprocess.run(["umount", "--lazy", str(output)], check=True)


def fill(output: Path) -> None:
    path = output / FILLER
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - ROOM)


def make_read_only(output: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(output)], check=True)


def before(
    output: Path, method: str, number: int, change: Callable[[Path], None], owner: type = CheckedSaves
) -> Callable[[], None]:
    """Have the first process change the disk when it saves for the `number`th time (or the model at the end)."""

    def prepare() -> None:
        save, calls = getattr(owner, method), [0]

        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[0] += method != "save_model" or not (args or kwargs)
            if calls[0] == number and os.environ["RANK"] == "0":
                change(output)
            return save(self, *args, **kwargs)

        setattr(owner, method, changed)

    return prepare


def repair(output: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(output)], check=True)
    (output / FILLER).unlink(missing_ok=True)


QUICK = [("text_classification", 2, fill)]
CASES = [(recipe, processes, fill) for recipe in RECIPES for processes in (1, 2)]
CASES += [("text_classification", processes, make_read_only) for processes in (1, 2)]


@pytest.mark.parametrize(
    ("recipe", "processes", "change"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_checkpoint_that_cannot_be_written(
    groups: Groups, tmp_path: Path, disk: Path, recipe: str, processes: int, change: Callable[[Path], None]
) -> None:
    saved: dict[str, Any] = {}
    prepare = before(disk, "_save_checkpoint", 2, change)
    ended = groups.run(recipe, tmp_path, processes=processes, prepare=prepare)
    assert ended.statuses == [2] * processes, "\n".join(ended.logs)
    assert all((seconds or 0) < 10 for seconds in ended.seconds_after)
    transfers = "transfer_steps" in RECIPES[recipe]
    folder = disk / "_before_training" / "transfer" if transfers else disk
    first = folder / "checkpoint-2"
    saved = contents(first)
    assert "trainer_state.json" in saved
    error = ended.log.strip().splitlines()[-1]
    assert error.startswith("error: checkpoint-4 could not be written to ")
    assert "Earlier checkpoints are untouched" in error
    if change is fill:
        assert "kB are free there, about " in error
        assert not (folder / "checkpoint-4").exists()
    else:
        assert "Read-only file system" in error
    for log in ended.logs[1:]:
        assert log.strip().splitlines()[-1].startswith("error: checkpoint-4 is not saved: another process could not")
    repair(disk)
    again = groups.assert_goes_on(recipe, tmp_path, processes=processes)
    assert len(again.matching(rf"(?:Resuming|goes on) from {first}\b")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_model_at_the_end_cannot_be_written(groups: Groups, tmp_path: Path, disk: Path, processes: int) -> None:
    prepare = before(disk, "save_model", 1, fill)
    ended = groups.run("text_classification", tmp_path, processes=processes, prepare=prepare)
    assert ended.statuses == [2] * processes, "\n".join(ended.logs)
    assert "error: The model could not be written to " in ended.log.strip().splitlines()[-1]
    last = disk / f"checkpoint-{12 // processes}"
    before_it = contents(last)
    repair(disk)
    again = groups.assert_goes_on("text_classification", tmp_path, processes=processes)
    assert again.matching(r"Resuming from \S*/(checkpoint-\d+)") == [last.name]
    assert contents(last) == before_it


def raise_something(output: Path) -> None:
    raise ValueError("no failure of writing")


@pytest.mark.slow
def test_another_error_of_one_process_ends_all(groups: Groups, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    prepare = before(tmp_path / "output", "_save_rng_state", 2, raise_something, Trainer)
    ended = groups.run("text_classification", tmp_path, prepare=prepare)
    assert ended.statuses == [1, 2], "\n".join(ended.logs)
    assert "ValueError: no failure of writing" in ended.log
    assert "error: checkpoint-4 is not saved: another process could not write its part." in ended.logs[1]
    groups.assert_goes_on("text_classification", tmp_path)


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(groups: Groups, tmp_path: Path) -> None:
    """As a quota: every user can try that."""

    def limit(output: Path) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))

    prepare = before(tmp_path / "output", "_save_checkpoint", 2, limit)
    ended = groups.run("language_modeling", tmp_path, processes=2, prepare=prepare)
    assert ended.statuses == [2, 2], "\n".join(ended.logs)
    assert "error: checkpoint-4 could not be written to " in ended.log.strip().splitlines()[-1]
    groups.assert_goes_on("language_modeling", tmp_path)


@pytest.mark.parametrize("below", ["", "runs/new"])
def test_a_folder_that_is_read_only_is_told_before_anything_else(
    groups: Groups, tmp_path: Path, disk: Path, below: str
) -> None:
    make_read_only(disk)
    ended = groups.run("text_classification", tmp_path, "--output_dir", str(disk / below), processes=1)
    assert ended.statuses == [2]
    error = f"error: --output_dir {str(disk / below)!r}: nothing can be written to {str(disk)!r}."
    assert ended.log.strip().splitlines()[-1] == error
