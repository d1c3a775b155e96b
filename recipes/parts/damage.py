"""Is a checkpoint complete? A save that was cut off leaves one that is not.

Nothing is unpickled to find out: a file of torch is a zip archive, whose directory is at its end, and a safetensors
file says in its header how long it is. A checkpoint of these recipes also has a list of its files (`MANIFEST`).
"""

from __future__ import annotations

import errno
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

STATE, CONFIG, WEIGHTS, INDEX = (
    "trainer_state.json",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
MANIFEST = "saved_files.json"  # what all processes wrote; STATE is written after it, by Trainer
ADAPTER = "adapter_model.safetensors"  # of a run that trains LoRA, in place of the model's weights
# Of the tokenizer of a model for text, of the image processor of one for images: a checkpoint has one of them.
PROCESSORS = ("tokenizer_config.json", "preprocessor_config.json")
RANDOM_STATE = re.compile(r"rng_state(?:_(\d+))?\.pth")
# Of FSDP and DeepSpeed: weights and optimizer are in folders of their own.
PARTITIONED = re.compile(r"pytorch_model_fsdp|global_step\d")
SHARDED = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+")  # FSDP with SHARDED_STATE_DICT
ZERO_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_(model|optim)_states\.pt")


def damage(folder: Path, only_model: bool = False) -> str | None:
    """What keeps a run from going on from a checkpoint, as half a sentence; None if it is complete.

    Args:
        only_model: Of a run with `--save_only_model`, which writes no optimizer, scheduler and random states.
    """
    files = sizes(folder)
    saved: Mapping[str, int] = {}
    if MANIFEST in files:
        if found := file_damage(folder / MANIFEST):
            return f"{MANIFEST} {found}"
        saved = read_manifest(folder)["files"]
    needed = _needed(files, bool(saved), only_model) + [name for name in saved if not (only_model and _resumes(name))]
    for name in needed:
        if name not in files:
            return f"{name} is missing"
    if not only_model and (found := _random_state_damage(files)):
        return found
    for name in files:
        if found := file_damage(folder / name):
            return f"{name} {found}"
        # JSON is checked as it is: somebody may have edited it.
        if name in saved and not name.endswith(".json") and files[name] != saved[name]:
            return f"{name} has {files[name]} bytes in place of {saved[name]}"
    found = _shard_damage(folder) if INDEX in files else None
    found = found or _sharded_damage(folder, files) or _zero_damage(folder, files)
    if found:
        return found
    if not isinstance(json.loads((folder / STATE).read_text(encoding="utf-8")).get("global_step"), int):
        return f"{STATE} has no global_step"
    return None


def sizes(folder: Path) -> dict[str, int]:
    """Length of every file below a folder, in bytes, by its path in it."""
    found: dict[str, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return dict(sorted(found.items()))


def read_manifest(folder: Path) -> dict[str, Any]:
    """`processes`, how many saved the checkpoint, and `files` with their lengths; empty in one of another program."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _needed(files: Mapping[str, int], has_list: bool, only_model: bool) -> list[str]:
    """Names without which a run cannot go on, those first that are written last."""
    if any(PARTITIONED.match(name) for name in files):
        return [STATE]
    needed = [STATE, CONFIG, next((name for name in (INDEX, ADAPTER) if name in files), WEIGHTS)]
    # A run without tokenizer, such as attention transfer before fine-tuning, saves none.
    needed += [] if has_list or any(name in files for name in PROCESSORS) else [" or ".join(PROCESSORS)]
    return needed + ([] if only_model else ["optimizer.pt", "scheduler.pt"])


def _resumes(name: str) -> bool:
    return name in ("optimizer.pt", "scheduler.pt", "scaler.pt") or RANDOM_STATE.fullmatch(name) is not None


def _random_state_damage(files: Mapping[str, int]) -> str | None:
    """Every process saved a file of its own (with `--save_on_each_node` a node has those of its processes)."""
    found = [match[1] for name in files if (match := RANDOM_STATE.fullmatch(name))]
    if not found:
        return "rng_state.pth is missing"
    ranks = {int(rank) for rank in found if rank is not None}
    absent = set(range(min(ranks), max(ranks))) - ranks if ranks else None
    return f"rng_state_{min(absent)}.pth is missing" if absent else None


def file_damage(path: Path) -> str | None:
    """What is wrong with one file, judged by the format that its name promises."""
    if path.stat().st_size == 0 and path.suffix != ".distcp":  # a process may have had nothing to write
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


def _shard_damage(folder: Path) -> str | None:
    """What is wrong with weights that are spread over several files."""
    shards: dict[str, set[str]] = {}
    index = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(index, dict) or not index:
        return f"{INDEX} has no weight_map"
    for tensor, name in index.items():
        shards.setdefault(name, set()).add(tensor)
    for name, tensors in shards.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        with safe_open(folder / name, framework="pt") as shard:
            if absent := tensors - set(shard.keys()):
                return f"{name} has no tensor {min(absent)!r}"
    return None


def _sharded_damage(folder: Path, files: Mapping[str, int]) -> str | None:
    """FSDP: `.metadata`, written last, names the files that the processes wrote. It is a pickle, of which the text is
    read and nothing is built.
    """
    parts = sorted({name.split("/")[0] for name in files if SHARDED.fullmatch(name.split("/")[0])})
    if any(part.startswith("pytorch_model_fsdp") for part in parts):
        parts = sorted({*parts, "optimizer_0"})
    for part in parts:
        metadata = f"{part}/.metadata"
        if metadata not in files:
            return f"{metadata} is missing"
        try:
            texts = {value for _, value, _ in pickletools.genops((folder / metadata).read_bytes())}
        except Exception as error:  # whatever the garbage is taken for
            return f"{metadata} is cut off or was overwritten ({error})"
        named = sorted(text for text in texts if isinstance(text, str) and text.endswith(".distcp"))
        if not named:
            return f"{metadata} names no files"
        for name in named:
            if not files.get(f"{part}/{name}"):
                return f"{part}/{name} is {'empty' if f'{part}/{name}' in files else 'missing'}"
    return None


def _zero_damage(folder: Path, files: Mapping[str, int]) -> str | None:
    """DeepSpeed: `latest`, written last, names the folder; every process has a file of optimizer states in it."""
    tags = sorted({name.split("/")[0] for name in files if re.fullmatch(r"global_step\d+", name.split("/")[0])})
    if not tags and "latest" not in files:
        return None
    if "latest" not in files:
        return "latest is missing"
    tag = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
    names = [name.removeprefix(f"{tag}/") for name in files if name.startswith(f"{tag}/")]
    if not names:
        return f"latest names {tag!r}, which is missing"
    if not any(name.endswith("model_states.pt") for name in names):
        return f"{tag} has no model states"
    processes = sum(RANDOM_STATE.fullmatch(name) is not None for name in files)
    for kind in ("optim", "model"):
        found = {int(match[1]) for name in names if (match := ZERO_RANK.search(name)) and match[2] == kind}
        expected = set(range(processes)) if found or kind == "optim" else set()
        if absent := expected - found:
            return f"{tag}/zero_pp_rank_{min(absent)}_mp_rank_00_{kind}_states.pt is missing"
    return None
