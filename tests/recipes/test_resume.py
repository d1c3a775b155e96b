"""Recipe runs that were cut short: what the same command line goes on from, and that nothing shows in the result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recipe_runs
from hub_server import ROOT, environment, run
from recipe_runs import (
    ROWS,
    STEPS_PER_EPOCH,
    arguments,
    assert_same_weights,
    train,
    weights,
)
from safetensors.torch import load_file, save_file

from parts.checkpoints import damage, find_checkpoint
from parts.common import RecipeError
from parts.damage import MANIFEST
from parts.training import RecipeTrainingArguments
from scripts.kill_parts.inputs import SETTINGS, build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    build(path, ROWS)
    return path


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Callable[..., Path]:
    """The output folder of a run that nothing disturbed, made once per command line."""
    made: dict[tuple[str, ...], Path] = {}

    def run(kind: str = "favor_plus", *changes: str) -> Path:
        key = (kind, *changes)
        if key not in made:
            output = folder / f"undisturbed-{len(made)}"
            train(arguments(folder, output, kind, *changes))
            made[key] = output
        return made[key]

    return run


# -- the data after a resume --------------------------------------------------------------------------------------
# In the first epoch; at its end, where the evaluation that follows the save is not repeated; in the second.
CUTS = [(kind, cut) for kind in (*SETTINGS, "softmax") for cut in (3, 7, 9)]
QUICK = [("favor_plus", 9), ("lara", 7), ("eva", 9)]


@pytest.mark.parametrize(
    ("kind", "cut"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CUTS]
)
def test_a_run_cut_in_any_epoch_ends_with_the_same_weights(
    folder: Path, tmp_path: Path, undisturbed: Callable[..., Path], kind: str, cut: int
) -> None:
    whole = undisturbed(kind)
    argv = arguments(folder, tmp_path, kind)
    before = train(argv, cut_after=cut)
    after = train(argv)
    rows = 4 * (2 * STEPS_PER_EPOCH - (cut - 1) // 2 * 2)
    assert (len(before.seen), len(after.seen)) == (4 * cut, rows)
    assert_same_weights(tmp_path, whole)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(["--train_sampling_strategy", "random"], marks=pytest.mark.slow),
        # Three steps an epoch; then two, the last of which has two batches.
        ["--gradient_accumulation_steps", "2"],
        pytest.param(["--gradient_accumulation_steps", "4", "--save_steps", "1"], marks=pytest.mark.slow),
        pytest.param(["--train_sampling_strategy", "sequential"], marks=pytest.mark.slow),
        pytest.param(["--dataloader_num_workers", "2"], marks=pytest.mark.slow),
        pytest.param(
            ["--dataloader_num_workers", "2", "--dataloader_persistent_workers", "true"], marks=pytest.mark.slow
        ),
        # The last batch of an epoch is smaller.
        pytest.param(["--per_device_train_batch_size", "5"], marks=pytest.mark.slow),
        pytest.param(["--data_seed", "7"], marks=pytest.mark.slow),
        pytest.param(["--bf16"], marks=pytest.mark.slow),
        pytest.param(["--save_strategy", "epoch", "--save_total_limit", "1"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_whatever_feeds_the_model(
    folder: Path, tmp_path: Path, undisturbed: Callable[..., Path], changes: list[str]
) -> None:
    whole = undisturbed("lara", *changes)
    argv = arguments(folder, tmp_path, "lara", *changes)
    last = json.loads((whole / "trainer_state.json").read_text())["global_step"]
    train(argv, cut_after=last - 1)
    train(argv)
    assert_same_weights(tmp_path, whole)


@pytest.mark.parametrize("strategy", ["group_by_length", pytest.param("random", marks=pytest.mark.slow)])
def test_an_epoch_has_an_order_of_its_own(folder: Path, tmp_path: Path, strategy: str) -> None:
    """Every row once an epoch, in an order that follows from the seed of the data and the epoch alone."""

    def orders(name: str, *changes: str) -> list[list[str]]:
        argv = arguments(folder, tmp_path / name, "softmax", "--train_sampling_strategy", strategy, *changes)
        seen = [str([i for i in ids if i]) for ids in train(argv).seen]
        return [seen[:ROWS], seen[ROWS:]]

    first, second = orders("a")
    assert len(set(first)) == len(set(second)) == ROWS
    assert sorted(first) == sorted(second)
    assert first != second
    assert orders("b", "--seed", "1", "--data_seed", "42") == [first, second]
    assert orders("c", "--data_seed", "1") != [first, second]
    # What else is drawn does not matter.
    assert orders("d", "--eval_strategy", "steps", "--eval_steps", "1") == [first, second]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_resume_with_two_processes(folder: Path, tmp_path: Path, strategy: str) -> None:
    """Each row goes to one of them, in every epoch, and a run cut in its second epoch ends with the same weights."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = environment(HF_HOME=str(folder / "home"), ACCELERATE_USE_CPU="true")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "recipes"), env["PYTHONPATH"]])

    def go(name: str, cut: int) -> list[list[str]]:
        argv = arguments(folder, tmp_path / name, "lara", "--train_sampling_strategy", strategy)
        run([*launch, recipe_runs.__file__, str(tmp_path / f"{name}-{cut}"), str(cut), *argv], env)
        seen = [json.loads((tmp_path / f"{name}-{cut}-{rank}.json").read_text()) for rank in range(2)]
        return [[str([i for i in ids if i]) for ids in rank] for rank in seen]

    whole = go("whole", 0)
    half = ROWS // 2
    for epoch in (slice(0, half), slice(half, 2 * half)):
        assert len(set(whole[0][epoch]) | set(whole[1][epoch])) == ROWS
    go("cut", 5)  # of six steps
    assert go("cut", 0) == [rank[-8:] for rank in whole]  # from step 4
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


# -- damaged checkpoints ------------------------------------------------------------------------------------------
FILES = [
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
]


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_off_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zeros(path: Path) -> None:
    """What a file system may leave of a file whose length was written and whose content was not."""
    path.write_bytes(bytes(path.stat().st_size))


def other_json(path: Path) -> None:
    path.write_text("[]")


DAMAGES = [
    (name, how) for name in FILES for how in (remove, empty, cut_off) if (name, how) != ("tokenizer.json", remove)
]
DAMAGES += [(name, zeros) for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")]
DAMAGES += [("model.safetensors", cut_off_last_byte), ("trainer_state.json", other_json), ("config.json", other_json)]


@pytest.fixture
def output(tmp_path: Path, undisturbed: Callable[..., Path]) -> Path:
    """The output folder of a finished run, to be damaged."""
    shutil.copytree(undisturbed(), tmp_path / "output")
    (tmp_path / "output" / "model.safetensors").unlink()
    return tmp_path / "output"


def find(output: Path, **changes: Any) -> str | None:
    """What a run with these arguments goes on from."""
    settings = json.loads((output / "config.json").read_text())["linear_attention"]
    return find_checkpoint(RecipeTrainingArguments(output_dir=str(output), **changes), settings)


@pytest.mark.parametrize(("name", "how"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_checkpoint_is_told(
    output: Path, name: str, how: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    how(output / "checkpoint-12" / name)
    assert find(output) == str(output / "checkpoint-10")
    lines = [line for line in caplog.messages if "checkpoint-12" in line]
    assert len(lines) == 1
    assert name in lines[0]
    assert "\n" not in lines[0]
    assert {path.name for path in output.glob("*-12")} == {"_damaged-checkpoint-12"}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", cut_off),
        pytest.param("trainer_state.json", remove, marks=pytest.mark.slow),
        pytest.param("optimizer.pt", empty, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_skipped(
    folder: Path,
    output: Path,
    undisturbed: Callable[..., Path],
    name: str,
    how: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    how(output / "checkpoint-12" / name)
    seen = train(arguments(folder, output)).seen
    assert len(seen) == 2 * 4  # from step 10 to step 12
    lines = [line for line in caplog.messages if "checkpoint-12" in line]
    assert len(lines) == 1
    assert name in lines[0]
    assert f"Resuming from {output / 'checkpoint-10'}" in caplog.text
    assert_same_weights(output, undisturbed())
    assert_same_weights(output / "checkpoint-12", undisturbed())
    assert len(train(arguments(folder, output)).seen) == 0  # whole again


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_that_was_named_is_refused(output: Path, name: str) -> None:
    named = output / "checkpoint-12"
    cut_off(named / name)
    with pytest.raises(RecipeError, match=rf"(?s)--resume_from_checkpoint.*checkpoint-12.*{name}.*leave the flag out"):
        find(output, resume_from_checkpoint=str(named))
    assert named.is_dir()  # a refusal leaves everything as it was


def test_a_shard_may_be_missing(output: Path) -> None:
    checkpoint = output / "checkpoint-12"
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / MANIFEST).unlink()  # sharded by somebody else
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for name, part in shards.items():
        save_file({key: tensors[key] for key in part}, checkpoint / name)
    index = {key: name for name, part in shards.items() for key in part}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert damage(checkpoint) is None
    save_file({names[9]: tensors[names[9]]}, checkpoint / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors has no tensor" in str(damage(checkpoint))
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    assert damage(checkpoint) == "model-00002-of-00002.safetensors is missing"


def test_a_checkpoint_of_the_model_alone(output: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (output / "checkpoint-12" / name).unlink()
    assert damage(output / "checkpoint-12") == "optimizer.pt is missing"
    assert find(output, save_only_model=True) == str(output / "checkpoint-12")


def test_random_states_of_several_processes(
    output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(RecipeTrainingArguments, "world_size", 2)
    for module in ("parts.together", "parts.checkpoints"):
        monkeypatch.setattr(f"{module}.gather", lambda value, training: [value])
    assert find(output) == str(output / "checkpoint-12")  # saved by one process: the best there is, but told
    assert "saved by another number of processes than 2" in caplog.text
    states = {number: output / f"checkpoint-{number}" / "rng_state.pth" for number in (10, 12)}
    shutil.copy(states[10], states[10].with_name("rng_state_1.pth"))
    for path in states.values():
        path.rename(path.with_name("rng_state_0.pth"))
        (path.parent / MANIFEST).unlink()  # of a version that wrote none
    caplog.clear()
    assert find(output) == str(output / "checkpoint-10")  # the other was cut off before the second process wrote
    assert "rng_state_1.pth is missing" in caplog.text
    assert "another number" not in caplog.text


def test_without_a_complete_checkpoint_the_run_starts_anew(
    folder: Path, output: Path, undisturbed: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    for checkpoint in output.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    assert len(train(arguments(folder, output)).seen) == 2 * ROWS
    assert "No checkpoint in" in caplog.text
    assert_same_weights(output, undisturbed())


def test_files_of_a_damaged_checkpoint_do_not_mix_with_new_ones(folder: Path, output: Path) -> None:
    damaged = output / "checkpoint-12"
    (damaged / "trainer_state.json").unlink()
    (damaged / "rng_state_1.pth").write_bytes(b"of another run")
    train(arguments(folder, output))
    names = {path.name for path in (output / "checkpoint-10").iterdir()}
    assert {path.name for path in damaged.iterdir()} == names


def test_the_limit_of_checkpoints_holds_beside_damaged_ones(
    folder: Path, output: Path, undisturbed: Callable[..., Path]
) -> None:
    empty(output / "checkpoint-12" / "optimizer.pt")
    empty(output / "checkpoint-4" / "optimizer.pt")  # as if it was being deleted
    train(arguments(folder, output, "favor_plus", "--save_total_limit", "2"))
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-12"}
    assert_same_weights(output, undisturbed())


def test_later_checkpoints_of_another_course_are_not_resumed(
    folder: Path, output: Path, undisturbed: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A run from scratch, or from an early checkpoint, must not go on from what an earlier run has left."""
    train(arguments(folder, output, "favor_plus", "--from_scratch", "--seed", "3"), cut_after=5)
    assert "It is now _earlier-checkpoint-12" in caplog.text
    caplog.clear()
    assert len(train(arguments(folder, output, "favor_plus", "--seed", "3")).seen) == 4 * 8
    assert f"Resuming from {output / 'checkpoint-4'}" in caplog.text
    early = ["--resume_from_checkpoint", str(output / "checkpoint-2"), "--seed", "3"]
    train(arguments(folder, output, "favor_plus", *early), cut_after=3)
    assert len(train(arguments(folder, output, "favor_plus", "--seed", "3")).seen) == 4 * 10
    assert weights(output).keys() == weights(undisturbed()).keys()
