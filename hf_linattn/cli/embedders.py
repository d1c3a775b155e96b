"""Checkpoints of sentence-transformers: what lies beside the model in its folder (pooling and so on) goes along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..errors import InputError

MODULES = "modules.json"
SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")
LENGTH = "max_seq_length"  # in the second of them


def embedder_files(source: str, revision: str = "main") -> dict[str, Path]:
    """The files of sentence-transformers in a folder or on the Hub, without its model's: name -> where it is.

    None for a checkpoint of Transformers alone, and for one whose model is not beside its `modules.json`.

    Raises: `InputError` for a `modules.json` that is none.
    """
    found = _find(source, MODULES, revision)
    if found is None:
        return {}
    first, *others = _paths(found)
    if first not in ("", "."):
        return {}
    folder, names = Path(source), [MODULES, *SETTINGS]
    if not folder.is_dir():
        wanted = [*names, *(f"{path}/*" for path in others)]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    files = [path for name in names for path in folder.glob(name)]
    files += [path for other in others for path in (folder / other).rglob("*")]
    return {path.relative_to(folder).as_posix(): path for path in files if path.is_file()}


def copy_files(files: Mapping[str, Path], folder: Path, max_length: int | None = None) -> None:
    """Copy them into the folder of a saved model; with `max_length` texts have so many tokens from now on."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        if max_length is not None and PurePosixPath(name).match(SETTINGS[1]):
            settings = json.loads(target.read_text(encoding="utf-8"))
            if settings.get(LENGTH) is not None:
                target.write_text(json.dumps({**settings, LENGTH: max_length}, indent=2) + "\n", encoding="utf-8")


def _find(source: str, name: str, revision: str) -> Path | None:
    if Path(source).is_dir():
        return path if (path := Path(source, name)).is_file() else None
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError):  # not there, or not in the cache of a machine that is offline
        return None


def _paths(modules: Path) -> list[str]:
    """Where the modules are, in their order: within the folder."""
    try:
        paths = [module["path"] for module in json.loads(modules.read_text(encoding="utf-8"))]
        inside = all(not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts for path in paths)
    except (ValueError, KeyError, TypeError):
        paths, inside = [], False
    if not paths or not inside:
        raise InputError(f"{str(modules)!r} is no list of modules, as sentence-transformers writes it.")
    return paths
