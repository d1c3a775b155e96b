"""Reading a checkpoint that a save has left half in place, or is just replacing: all files read belong to one save.

The linear attention of a loaded model is attached and checked in `mixin.py`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..integrations.model_seams import CONFIG_NAME, WEIGHTS_POINTER
from .saving import is_pending, pending_save

_ATTEMPTS = 5


def load_consistently(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the stock `from_pretrained` so that all it reads belongs to one checkpoint.

    Where a save was cut off, the checkpoint is in a subfolder (`saving.py`). If one happens meanwhile, the folder is
    read again.

    Raises: `CheckpointError` if another checkpoint came under a config that the caller had read before.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.path.isdir(source):
        return load(source, *args, **kwargs)
    folder = Path(source, kwargs.get("subfolder") or "")
    for attempt in range(_ATTEMPTS):
        before, content = _identity(folder), _content(folder)
        try:
            loaded = load(source, *args, **_from_pending(folder, kwargs))
        except Exception:
            if _identity(folder) == before or attempt == _ATTEMPTS - 1:
                raise
        else:
            if _identity(folder) == before:
                return loaded
        if kwargs.get("config") is not None and _content(folder) != content:
            break
    raise CheckpointError(
        f"{os.fspath(source)!r} was saved anew while it was loaded: what was read may belong to two checkpoints. Load "
        "it again."
    )


def _from_pending(folder: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that load from the subfolder which holds the checkpoint, if one does."""
    config, pending = kwargs.get("config"), pending_save(folder)
    if is_pending(getattr(config, WEIGHTS_POINTER, None)):  # read while a save was under way
        config = copy.deepcopy(config)
        delattr(config, WEIGHTS_POINTER)
        kwargs = {**kwargs, "config": config}
    if pending is not None:
        kwargs = {**kwargs, "subfolder": os.path.join(kwargs.get("subfolder") or "", pending)}
    return kwargs


def _identity(folder: Path) -> tuple[int, ...] | None:
    """Which file config.json is: every save puts another one there."""
    try:
        found = (folder / CONFIG_NAME).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _content(folder: Path) -> bytes | None:
    """The new config.json, wherever it is."""
    try:
        return (folder / (pending_save(folder) or "") / CONFIG_NAME).read_bytes()
    except OSError:
        return None
