"""Which checkpoint a run goes on from: the last complete one. What was cut off while it was written is set aside.

Nothing is unpickled to find out: a file of torch is a zip archive, whose directory is at its end, and a safetensors
file says in its header how long it is.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainingArguments

from _common import RecipeError

logger = logging.getLogger("hf_linattn.recipes")

STATE, CONFIG, WEIGHTS, INDEX = (
    "trainer_state.json",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
ADAPTER = "adapter_model.safetensors"  # of a run that trains LoRA, in place of the model's weights
# Of the tokenizer of a model for text, of the image processor of one for images: a checkpoint has one of them.
PROCESSORS = ("tokenizer_config.json", "preprocessor_config.json")
# Of FSDP and DeepSpeed: weights and optimizer are in folders of their own, which are not looked into.
PARTITIONED = re.compile(r"pytorch_model_fsdp|global_step\d")


# -- is a checkpoint complete? ----------------------------------------------------------------------------------------
def damage(folder: Path, only_model: bool = False) -> str | None:
    """What keeps a run from going on from a checkpoint, as half a sentence; None if it is complete.

    Args:
        only_model: Of a run with `--save_only_model`, which writes no optimizer, scheduler and random states.
    """
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    needed = [STATE]  # what Trainer writes last
    if not any(PARTITIONED.match(path.name) for path in folder.iterdir()):
        needed += [CONFIG, next((name for name in (INDEX, ADAPTER) if name in files), WEIGHTS)]
        needed += [] if any(name in files for name in PROCESSORS) else [" or ".join(PROCESSORS)]
        needed += [] if only_model else ["optimizer.pt", "scheduler.pt"]
    for name in needed:
        if name not in files:
            return f"{name} is missing"
    if not only_model and not any(name.startswith("rng_state") for name in files):
        return "rng_state.pth is missing"
    for name, path in files.items():
        if found := _file_damage(path):
            return f"{name} {found}"
    if INDEX in files and (found := _shard_damage(files)):
        return found
    if not isinstance(json.loads(files[STATE].read_text(encoding="utf-8")).get("global_step"), int):
        return f"{STATE} has no global_step"
    return None


def _file_damage(path: Path) -> str | None:
    """What is wrong with one file, judged by the format that its name promises."""
    if path.stat().st_size == 0:
        return "is empty"
    try:
        if path.suffix == ".json":
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                return "holds no JSON object"
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the length of the file
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    archive.open(member).close()  # is it where the directory says?
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place outside of the file; anything else is not the file's fault
            raise
        return f"is cut off or was overwritten ({error})"
    except Exception as error:  # readers of archives raise all sorts of things about garbage
        return f"is cut off or was overwritten ({error})"
    return None


def _shard_damage(files: Mapping[str, Path]) -> str | None:
    """What is wrong with weights that are spread over several files."""
    shards: dict[str, set[str]] = {}
    index = json.loads(files[INDEX].read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(index, dict) or not index:
        return f"{INDEX} has no weight_map"
    for tensor, name in index.items():
        shards.setdefault(name, set()).add(tensor)
    for name, tensors in shards.items():
        if name not in files:
            return f"{name} is missing"
        with safe_open(files[name], framework="pt") as shard:
            if absent := tensors - set(shard.keys()):
                return f"{name} has no tensor {min(absent)!r}"
    return None


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
    """The checkpoint to go on from. Damaged ones are set aside and named, one line each."""
    reasons = {path: damage(path, training.save_only_model) for path in list_checkpoints(output)}
    whole = [path for path, reason in reasons.items() if reason is None]
    missing = {path: _missing_random_states(path, training) for path in whole}
    # One may have been cut off between the files of two processes. If none has them all, fewer processes saved them.
    found = next((path for path in whole if missing[path] is None), whole[0] if whole else None)
    for path in whole[: whole.index(found)] if found else []:
        reasons[path] = f"{missing[path]} is missing"
    for path, reason in reasons.items():
        if reason is not None and training.should_save:
            renamed = set_aside(path, "damaged")
            logger.warning("Skipping %s, which is incomplete: %s. It is now %s", path, reason, renamed.name)
    if reasons and not found:
        logger.warning("No checkpoint in %s is complete: starting anew", output)
    return found


def _missing_random_states(folder: Path, training: TrainingArguments) -> str | None:
    """The first file of random states that the run would look for in vain."""
    if training.save_only_model:
        return None
    ranks = range(training.world_size)
    names = ["rng_state.pth"] if len(ranks) == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
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
    Raises: RecipeError if the checkpoint that was named is not complete, or was trained with other settings.
    """
    wanted = None if training.resume_from_checkpoint in ("True", "true") else training.resume_from_checkpoint
    output = Path(training.output_dir)
    # One process renames, before the others look.
    with training.main_process_first(local=training.save_on_each_node, desc="looking for checkpoints"):
        found = None
        if wanted:
            found = Path(wanted)
            _check_named(found, training.save_only_model)
        elif not from_scratch:
            found = last_complete(output, training)
        if found:
            _check_settings(found, present)
            _check_adapter(found, has_adapter)
        if training.should_save and (wanted or from_scratch):
            _set_aside_later(output, found)
    if not found:
        return None
    if missing := _missing_random_states(found, training):
        logger.warning(
            "%s was saved by another number of processes than %d, it has no %s: dropout will draw other numbers",
            found,
            training.world_size,
            missing,
        )
    logger.warning("Resuming from %s (--from_scratch starts anew)", found)
    return str(found)


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
