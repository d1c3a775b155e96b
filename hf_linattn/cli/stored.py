"""What a checkpoint says of itself: its config, and the headers of its files. Weights stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import AutoModel

from ..errors import CheckpointError
from ..models.publishing import INDEX, model_files
from ..models.saving import pending_save
from ..modules.contract import CALIBRATED_TOKENS
from .checkpoints import model_class

WEIGHTS = "model.safetensors"
_PART = ".linattn."


def empty_model(config: Any) -> Any:
    """A model without values: modules, names and shapes alone."""
    cls = model_class(config)
    with torch.device("meta"):
        return cls.from_config(config) if cls is AutoModel else cls(config)


@dataclass(frozen=True)
class StoredTensors:
    """The tensors in the files of a checkpoint.

    Args:
        dtypes: Name of a tensor -> name of its dtype.
        files: The files that are on this machine.
    """

    dtypes: Mapping[str, str]
    files: tuple[Path, ...] = ()

    def missing(self, model: Any) -> list[str]:
        """Tensors of linear attention that a model has and the checkpoint lacks."""
        return sorted(name for name in model.state_dict() if _PART in name and name not in self.dtypes)

    def calibrated_tokens(self, layer: str) -> int | None:
        """On how many tokens a layer was calibrated; `None` if that is not at hand."""
        wanted = f"{layer}{_PART}{CALIBRATED_TOKENS}"
        for path in self.files:
            with safe_open(path, "pt") as opened:
                if wanted in opened.keys():
                    return int(opened.get_tensor(wanted))
        return None


def stored_tensors(source: str, revision: str = "main") -> StoredTensors | None:
    """The tensors of a checkpoint in a folder, in the cache or on the Hub; `None` where there are no safetensors.

    Raises: `CheckpointError` for a file that is cut off or none.
    """
    folder = Path(source)
    if folder.is_dir():
        files = [path for path in model_files(folder / (pending_save(folder) or "")) if path.suffix == ".safetensors"]
        return _read(files)
    cached = [try_to_load_from_cache(source, name, revision=revision) for name in (INDEX, WEIGHTS)]
    places = [Path(path).parent for path in cached if isinstance(path, str)]
    if places:
        return _read(sorted(places[0].glob("*.safetensors")))
    try:
        found = get_safetensors_metadata(source, revision=revision)
    except (OSError, ValueError):  # not on the Hub, no network, or no such file there
        return None
    headers = found.files_metadata.values()
    return StoredTensors({name: tensor.dtype for header in headers for name, tensor in header.tensors.items()})


def _read(files: list[Path]) -> StoredTensors | None:
    dtypes: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as opened:
                dtypes |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be read ({error}). Save or download it again.") from error
    return StoredTensors(dtypes, tuple(files)) if files else None
