"""Which checkpoint a run goes on from: the last complete one. What was cut off while it was written is set aside.

The processes that write checkpoints look and decide: one, or one a node with `--save_on_each_node`. The others are
told, and wait until a lagging file system shows them the files.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .common import RecipeError
from .damage import ADAPTER, CONFIG, MANIFEST, STATE, damage, read_manifest
from .together import decided, gather

logger = logging.getLogger("hf_linattn.recipes")

WAIT = 60.0  # seconds that a file system may take to show what another node has written


# -- the checkpoints of a run -----------------------------------------------------------------------------------------
def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def list_checkpoints(output: Path) -> list[Path]:
    """The folders that Trainer takes for checkpoints, last step first."""
    found = [path for path in output.glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of, reverse=True)


def set_aside(folder: Path, word: str) -> Path:
    """Rename a checkpoint, so that no other is written into it. One of each name is kept.

    Trainer neither counts nor uploads what begins with an underscore.
    """
    target = folder.with_name(f"_{word}-{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    return folder.rename(target)


def last_complete(output: Path, training: TrainingArguments) -> Path | None:
    """The checkpoint to go on from, the same on every process. Damaged ones are set aside and named, one line each."""

    mine: dict[Path, tuple[str | None, str | None]] = {}

    def look() -> dict[int, tuple[str | None, str | None]]:
        """Step -> what is damaged; which random states are missing, if as many processes saved it."""
        for path in list_checkpoints(output):
            # Without a list of its files, a checkpoint may have been cut off between those of two processes.
            missing = None if (path / MANIFEST).is_file() else _missing_random_states(path, training)
            mine[path] = (damage(path, training.save_only_model), missing)
        return {step_of(path): each for path, each in mine.items()}

    looked = decided(look, training)
    steps = sorted({step for each in looked for step in each}, reverse=True)
    whole = [step for step in steps if all(step in each and each[step][0] is None for each in looked)]
    # If none has all random states, another number of processes saved them.
    found = next((step for step in whole if all(each[step][1] is None for each in looked)), None)
    found = whole[0] if found is None and whole else found

    def tidy() -> None:
        for path, (reason, missing) in mine.items():
            if reason is None and found is not None and step_of(path) > found:
                reason = f"{missing} is missing" if missing else "another node does not have all of it"
            if reason is not None:
                renamed = set_aside(path, "damaged")
                logger.warning("Skipping %s, which is incomplete: %s. It is now %s", path, reason, renamed.name)

    decided(tidy, training)
    if steps and found is None:
        logger.warning("No checkpoint in %s is complete: starting anew", output)
    return None if found is None else output / f"checkpoint-{found}"


def _missing_random_states(folder: Path, training: TrainingArguments) -> str | None:
    """The first file of random states that the run would look for in vain."""
    if training.save_only_model:
        return None
    ranks = range(training.world_size)
    if training.save_on_each_node:  # a folder has those of its node
        ranks = range(training.process_index, training.process_index + 1)
    names = ["rng_state.pth"] if training.world_size == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    return next((name for name in names if not (folder / name).is_file()), None)


def find_checkpoint(
    training: TrainingArguments,
    present: Mapping[str, Any] | None,
    from_scratch: bool = False,
    *,
    has_adapter: bool = False,
) -> str | None:
    """Where to resume: the checkpoint that was named, else the last complete one in the output folder.

    Args:
        present: `linear_attention` settings of the run's model; None for a stock model.
        from_scratch: Ignore the checkpoints in the output folder.
        has_adapter: Whether the run trains LoRA.
    Returns: Its folder, None to start anew.
    Raises: RecipeError if the checkpoint that was named is not complete, or was trained with other settings; on all
        processes, if one of them does not see it.
    """
    wanted = None if training.resume_from_checkpoint in ("True", "true") else training.resume_from_checkpoint
    output = Path(training.output_dir)
    found = Path(wanted) if wanted else None
    if found is None and not from_scratch:
        found = last_complete(output, training)

    def check() -> None:
        if wanted and found:
            _check_named(found, training.save_only_model)
        if found:
            _check_settings(found, present)
            _check_adapter(found, has_adapter)
        if wanted or from_scratch:
            _set_aside_later(output, found)

    decided(check, training)
    if not found:
        return None
    _wait_for(found, training)
    processes, missing = read_manifest(found).get("processes"), _missing_random_states(found, training)
    if missing:
        logger.warning(
            "%s was saved by another number of processes than %d%s, it has no %s: dropout will draw other numbers",
            found,
            training.world_size,
            f" (by {processes})" if processes else "",
            missing,
        )
    logger.warning("Resuming from %s (--from_scratch starts anew)", found)
    return str(found)


def _wait_for(found: Path, training: TrainingArguments) -> None:
    """Return when every process sees all files of a checkpoint. Raises: RecipeError on all of them."""
    end = time.monotonic() + WAIT
    reason = damage(found, training.save_only_model) if found.is_dir() else "there is no such folder"
    while reason is not None and time.monotonic() < end:
        time.sleep(0.5)
        reason = damage(found, training.save_only_model) if found.is_dir() else "there is no such folder"
    for rank, each in enumerate(gather(reason, training)):
        if each is not None:
            raise RecipeError(
                f"Process {rank} does not see {found} as it was saved: {each}. Put --output_dir on a file system that "
                "all nodes share, or give --save_on_each_node from the first start on."
            )


def _check_named(folder: Path, only_model: bool) -> None:
    if not folder.is_dir():
        raise RecipeError(f"--resume_from_checkpoint must be a checkpoint folder; {str(folder)!r} is none.")
    if reason := damage(folder, only_model):
        raise RecipeError(
            f"--resume_from_checkpoint must be a complete checkpoint; {str(folder)!r} is none: {reason}. Name another "
            "one, or leave the flag out to go on from the last complete one in --output_dir."
        )


def _check_settings(folder: Path, present: Mapping[str, Any] | None) -> None:
    if not (folder / CONFIG).is_file():  # of FSDP with sharded weights, which has none
        return
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("linear_attention")
    present = json.loads(json.dumps(present))
    if saved != present:
        raise RecipeError(
            f"{folder} was trained with other attention settings ({saved}) than this run has ({present}). "
            "Use another --output_dir, the same settings, or --from_scratch."
        )


def _check_adapter(folder: Path, has_adapter: bool) -> None:
    if (folder / ADAPTER).is_file() != has_adapter:
        trained, trains = ("LoRA", "the whole model") if not has_adapter else ("the whole model", "LoRA")
        raise RecipeError(
            f"{folder} was saved by a run that trained {trained}; this one trains {trains}. Use another --output_dir, "
            "the same --lora_target_modules, or --from_scratch."
        )


def _set_aside_later(output: Path, start: Path | None) -> None:
    """Set aside what an earlier course of the run saved after the step where this one starts.

    Trainer would write into the same folders, file by file, and a later start without the flag would go on from the
    last of them.
    """
    begun = json.loads((start / STATE).read_text(encoding="utf-8"))["global_step"] if start else 0
    for path in list_checkpoints(output):
        if step_of(path) > begun and (start is None or path.resolve() != start.resolve()):
            renamed = set_aside(path, "earlier")
            logger.warning("%s is of an earlier course of the run. It is now %s", path, renamed.name)
