"""Writing a checkpoint over another one: whenever it is cut off, the folder holds the old one or the new one.

Weights and config.json are several files, so moving them one by one cannot be atomic. One rename is:

1. Everything is written to a folder beside, `_incomplete_save_*`, and flushed to the disk.
2. A config.json that names the weights in that folder replaces the old one. This is the moment the new checkpoint
   begins to count: Transformers loads the file that `transformers_weights` in config.json names, and nothing else.
3. The new files replace the old ones under their usual names, the weights that are not needed any more go.
4. The usual config.json replaces the one of step 2, and the folder beside is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..distributed.fully_sharded import reshard
from ..errors import CheckpointError
from ..integrations.model_seams import CONFIG_NAME, WEIGHTS_POINTER

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Not uploaded by a Trainer, which leaves out names that start with an underscore.
STAGING_PREFIX = "_incomplete_save_"
_READY = "ready"  # in a staging folder: every file once more, to be moved away
_POINTING_CONFIG = "pointing_config.json"
_POINTING_INDEX = "pointing.safetensors.index.json"


def check_saveable(model: Any, state_dict: Any) -> None:
    """Get a sharded model ready for its state dict.

    Raises: CheckpointError where a process has only parts of the weights, which would be written as if they were all.
    """
    reshard(model)
    parts = [name for name, p in model.named_parameters() if hasattr(p, "ds_id") and p.numel() < p.ds_numel]
    parts += [name for name, p in model.named_parameters() if getattr(p, "_is_flat_param", False)]
    if parts and state_dict is None:
        raise CheckpointError(
            f"This process has only parts of the weights ({parts[0]}): DeepSpeed or FSDP1 has sharded them. Pass"
            " state_dict=accelerator.get_state_dict(model), or let the Trainer save."
        )


def save_atomically(
    save: Callable[..., None], folder: str | os.PathLike[str], arguments: dict[str, Any], *, writes: bool
) -> list[str]:
    """Save into a subfolder first, then put the files in place.

    Cut off at any moment, the folder holds the old checkpoint or the new one; the next save removes what is left over.
    After an error before the new one counts, nothing has changed.

    Args:
        save: The stock `save_pretrained`.
        writes: Whether this process writes files; the others still take part in gathering the weights.
    Returns: The names of the files that were written.
    """
    target = Path(folder)
    if target.is_file():
        raise NotADirectoryError(f"save_directory must be a folder; got the file {os.fspath(folder)!r}.")
    if not writes:
        save(folder, **arguments)
        return []
    target.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(target):
        _remove_left_overs(target)
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=target))
        try:
            staging.chmod(target.stat().st_mode & 0o777)  # a reader may have to look inside
            save(staging, **arguments)
            return _put_in_place(staging, target, arguments.get("variant"))
        finally:
            _remove_left_overs(target)


@contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    """Let other threads and processes that save into the same folder wait, where the system can lock a folder."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(target, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may hold the descriptor for longer
        os.close(descriptor)


def pending_save(folder: str | os.PathLike[str]) -> str | None:
    """The subfolder that holds the checkpoint, where a save has been cut off while it put its files in place."""
    try:
        values = json.loads(Path(folder, CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    pointer = values.get(WEIGHTS_POINTER) if isinstance(values, dict) else None
    return str(pointer).partition("/")[0] if is_pending(pointer) else None


def is_pending(pointer: Any) -> bool:
    """Whether what a config names as its weights is in the subfolder of a save."""
    return isinstance(pointer, str) and pointer.startswith(STAGING_PREFIX)


def is_weight_file(name: str, variant: str | None) -> bool:
    """Whether a file holds weights, or an index of them, of the given variant."""
    infix = "" if variant is None else rf"\.{re.escape(variant)}"
    shard = r"(-\d{5}-of-\d{5})?"
    # Transformers puts the variant before the shard's number in new files and after it in old ones.
    return bool(
        re.fullmatch(rf"(model|pytorch_model)({infix}{shard}|{shard}{infix})\.(safetensors|bin)", name)
    ) or bool(re.fullmatch(rf"(model\.safetensors|pytorch_model\.bin)\.index{infix}\.json", name))


def _put_in_place(staging: Path, target: Path, variant: str | None) -> list[str]:
    names = sorted(path.name for path in staging.iterdir() if path.is_file())
    weights = [name for name in names if is_weight_file(name, variant)]
    ready = staging / _READY
    ready.mkdir()
    for name in names:
        _link(staging / name, ready / name)
    if CONFIG_NAME not in names:
        _replace_adapter(ready, target, names)
        return names
    replaces = weights and (target / CONFIG_NAME).exists()
    if replaces:
        _write_pointing_config(staging, weights)
    _flush([*(staging / name for name in names), *staging.glob("pointing*"), ready, staging, target])
    if replaces:
        os.replace(staging / _POINTING_CONFIG, target / CONFIG_NAME)
        _flush([target])
    for path in target.iterdir():
        if path.is_file() and is_weight_file(path.name, variant) and path.name not in weights:
            path.unlink()
    for name in names:
        if name != CONFIG_NAME:
            os.replace(ready / name, target / name)
    _flush([target])
    os.replace(ready / CONFIG_NAME, target / CONFIG_NAME)
    _flush([target])
    return names


def _write_pointing_config(staging: Path, weights: list[str]) -> None:
    """The new config.json with the name of the weights in `staging`, where they have their usual names."""
    index = next((name for name in weights if name.endswith(".json")), None)
    pointer = f"{staging.name}/{weights[0]}"
    if index is not None:  # shards are looked for relative to the checkpoint's folder
        values = json.loads((staging / index).read_text(encoding="utf-8"))
        values["weight_map"] = {key: f"{staging.name}/{file}" for key, file in values["weight_map"].items()}
        pointer = f"{staging.name}/{_POINTING_INDEX}"
        (staging / _POINTING_INDEX).write_text(json.dumps(values), encoding="utf-8")
    values = json.loads((staging / CONFIG_NAME).read_text(encoding="utf-8"))
    (staging / _POINTING_CONFIG).write_text(json.dumps({**values, WEIGHTS_POINTER: pointer}), encoding="utf-8")


def _replace_adapter(ready: Path, target: Path, names: list[str]) -> None:
    """An adapter has no config.json that could name its weights; the model's own files are left alone.

    With the settings it had before, one rename replaces it. With others the weights go first: cut off in between, the
    folder holds no adapter, rather than the weights of one with the settings of the other.
    """
    _flush([*(ready / name for name in names), ready, target])
    settings = [name for name in names if name.endswith(".json")]
    rest = [name for name in names if name not in settings]
    if any(_read(ready / name) != _read(target / name) for name in settings):
        for name in rest:
            (target / name).unlink(missing_ok=True)
        _flush([target])
    for name in (*settings, *rest):
        os.replace(ready / name, target / name)
    _flush([target])


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _flush(paths: Iterable[Path]) -> None:
    """Have the disk hold what was written: a rename must not reach it before the file that it names."""
    for path in paths if os.name != "nt" else ():  # Windows flushes only what is open for writing
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # some file systems do not know it for folders
                raise
        finally:
            os.close(descriptor)


def _remove_left_overs(target: Path) -> None:
    """Remove staging folders, but the one that holds the checkpoint."""
    needed = pending_save(target)
    for path in target.glob(f"{STAGING_PREFIX}*"):
        if path.name != needed and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
