"""When a checkpoint of several processes is complete, and that all of them go on from the same one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from recipe_groups import Groups
from safetensors.torch import save_file

from parts import checkpoints
from parts.damage import MANIFEST, damage, sizes
from parts.training import RecipeTrainingArguments


# -- layouts ----------------------------------------------------------------------------------------------------------
def write(folder: Path, *, step: int = 4, ranks: int = 2) -> Path:
    """What Trainer writes for any strategy: its own state last, random states a process."""
    folder.mkdir(parents=True)
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    for rank in range(ranks):
        torch.save({"cpu": torch.random.get_rng_state()}, folder / f"rng_state_{rank}.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def whole(folder: Path, **options: Any) -> Path:
    """Of DDP."""
    write(folder, **options)
    torch.save({"state": {}}, folder / "optimizer.pt")
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    """Of FSDP with SHARDED_STATE_DICT."""
    write(folder)
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        dcp.save({"weight": torch.ones(8, 4)}, checkpoint_id=folder / name, no_dist=True)
    return folder


def zero(folder: Path) -> Path:
    """Of DeepSpeed, ZeRO-3 on two processes."""
    write(folder)
    (folder / "latest").write_text("global_step4")
    (folder / "global_step4").mkdir()
    for rank in range(2):
        for kind in ("model_states", "optim_states"):
            prefix = "bf16_" if kind == "optim_states" else ""
            path = folder / "global_step4" / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_{kind}.pt"
            torch.save({"state": torch.ones(4)}, path)
    return folder


def listed(folder: Path, processes: int = 2) -> Path:
    """With the list of files that the recipes write."""
    files = {name: length for name, length in sizes(folder).items() if name != "trainer_state.json"}
    (folder / MANIFEST).write_text(json.dumps({"processes": processes, "files": files}))
    return folder


def remove(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


ZERO_FILES = [
    f"global_step4/{prefix}zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
    for rank in range(2)
    for prefix, kind in (("", "model"), ("bf16_", "optim"))
]


PARTS = ("pytorch_model_fsdp_0", "optimizer_0")
SHARDS = [f"{part}/{name}" for part in PARTS for name in (".metadata", "__0_0.distcp")]
DAMAGES: list[tuple[Any, str, Any]] = [
    *((sharded, name, how) for name in SHARDS for how in (remove, empty)),
    (sharded, "pytorch_model_fsdp_0/.metadata", cut_off),
    (sharded, "trainer_state.json", remove),
    *((zero, name, how) for name in ZERO_FILES for how in (remove, cut_off)),
    (zero, "latest", remove),
    (zero, "latest", cut_off),
    (whole, "rng_state_0.pth", cut_off),
    (whole, "model.safetensors", cut_off),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("layout", "name", "how"), DAMAGES)
@pytest.mark.parametrize("has_list", [False, True])
def test_a_damaged_file_is_named(
    tmp_path: Path, layout: Callable[[Path], Path], name: str, how: Callable[[Path], None], has_list: bool
) -> None:
    folder = layout(tmp_path / "checkpoint-4")
    if has_list:
        listed(folder)
    assert damage(folder) is None
    how(folder / name)
    assert name.split("/")[-1] in str(damage(folder)) or name.split("/")[0] in str(damage(folder))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (sharded, "pytorch_model_fsdp_0/__0_0.distcp"),  # has no end that could be missed
        (whole, "rng_state_1.pth"),  # the last one: without a list nobody knows how many there were
    ],
)
def test_the_list_knows_more(tmp_path: Path, layout: Callable[[Path], Path], name: str) -> None:
    change = cut_off if name.endswith("distcp") else remove
    folder = layout(tmp_path / "checkpoint-4")
    change(folder / name)
    assert damage(folder) is None
    shutil.rmtree(folder)
    folder = listed(layout(folder))
    change(folder / name)
    assert name in str(damage(folder))


def test_random_states_may_be_missing_in_between(tmp_path: Path) -> None:
    folder = whole(tmp_path / "checkpoint-4", ranks=3)
    (folder / "rng_state_1.pth").unlink()
    assert damage(folder) == "rng_state_1.pth is missing"


def test_edited_settings_are_no_damage(tmp_path: Path) -> None:
    folder = listed(whole(tmp_path / "checkpoint-4"))
    (folder / "config.json").write_text('{"dropout": 0.2}')
    assert damage(folder) is None


# -- agreement --------------------------------------------------------------------------------------------------------
def asks(change: Callable[[int], list[str]]) -> Any:
    """A stand-in for a recipe: where would this process resume?"""

    def main(argv: list[str], callbacks: Any) -> None:
        rank = int(os.environ["RANK"])
        output = Path(argv[argv.index("--output_dir") + 1])
        flags = change(rank)
        place = output / str(rank) if "each node" in flags else output
        if "each node" in flags:
            os.environ["LOCAL_RANK"] = "0"
        training = RecipeTrainingArguments(output_dir=str(place), save_on_each_node="each node" in flags)
        try:
            found = checkpoints.find_checkpoint(training, None)
        except ValueError as error:
            found = f"error: {error}"
        (output / f"found-{rank}.txt").write_text(str(found))

    return main


def answers(groups: Groups, tmp_path: Path, change: Callable[[int], list[str]]) -> list[str]:
    ended = groups.run("text_classification", tmp_path, main=asks(change))
    assert ended.statuses == [0, 0], "\n".join(ended.logs)
    found = [(tmp_path / "output" / f"found-{rank}.txt").read_text() for rank in range(2)]
    return [text if text.startswith("error") else text.split("/")[-1] for text in found]


def lagging(looks: int) -> Callable[[int], list[str]]:
    """The second process sees the last checkpoint after so many looks; it gives up after a second."""

    def change(rank: int) -> list[str]:
        checkpoints.WAIT = 1.0
        if rank == 1:
            told, seen = checkpoints.damage, [0]

            def late(folder: Path, *args: Any) -> str | None:
                seen[0] += folder.name == "checkpoint-4"
                return "model.safetensors is missing" if seen[0] <= looks else told(folder, *args)

            checkpoints.damage = late  # type: ignore[assignment]
        return []

    return change


def test_all_wait_for_a_lagging_file_system(groups: Groups, tmp_path: Path) -> None:
    for step in (2, 4):
        listed(whole(tmp_path / "output" / f"checkpoint-{step}", step=step))
    assert answers(groups, tmp_path, lagging(1)) == ["checkpoint-4", "checkpoint-4"]
    found = answers(groups, tmp_path, lagging(100))
    assert found[0] == found[1]
    assert found[0].startswith("error: Process 1 does not see")
    assert "model.safetensors is missing" in found[0]
    assert (tmp_path / "output" / "checkpoint-4").is_dir()  # what one process does not see is not set aside


def test_nodes_agree_on_what_all_of_them_have(groups: Groups, tmp_path: Path) -> None:
    """`--save_on_each_node`: the second node has half of the last checkpoint, and none of the first."""
    output = tmp_path / "output"
    for node, steps in ((0, (1, 2, 4)), (1, (2, 4))):
        for step in steps:
            listed(whole(output / str(node) / f"checkpoint-{step}", step=step))
    (output / "1" / "checkpoint-4" / "model.safetensors").unlink()
    assert answers(groups, tmp_path, lambda rank: ["each node"]) == ["checkpoint-2", "checkpoint-2"]
    assert {path.name for path in (output / "0").iterdir()} == {
        "checkpoint-1",
        "checkpoint-2",
        "_damaged-checkpoint-4",
    }
    assert {path.name for path in (output / "1").iterdir()} == {"checkpoint-2", "_damaged-checkpoint-4"}
