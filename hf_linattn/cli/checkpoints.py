"""Checkpoints on the command line: a name or folder in, a model with its tokenizer or image processor out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel

import hf_linattn

from ..bench.workload import DTYPES, choose
from ..conversion import needs_calibration
from ..errors import ConfigError, InputError, LinAttnError, UncalibratedError, did_you_mean
from ..hub import write_card
from ..integrations.families import is_converted, takes_images
from ..models.publishing import CARD
from .embedders import copy_files

AS_SAVED = "auto"


class FailureError(Exception):
    """Something went wrong that another command line would not change, such as a network that is not there."""


def read_config(source: str, revision: str = "main") -> Any:
    """The config of a model by its name on the Hub or its folder."""
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not Path(source).is_dir():
        raise InputError(f"There is no folder {source!r} with a checkpoint.")
    return _loaded(source, "model", lambda: AutoConfig.from_pretrained(source, revision=revision))


def model_class(config: Any) -> Any:
    """The class, head included, that a checkpoint was saved with. The Auto class where nobody knows."""
    name = (config.architectures or [""])[0]
    return getattr(hf_linattn, name, None) or getattr(transformers, name, None) or AutoModel


def load_model(source: str, revision: str = "main", dtype: str = AS_SAVED, device: str | None = None) -> Any:
    """The model with the head it was saved with, in evaluation mode.

    Args:
        dtype: Of the weights, or "auto" for that of the checkpoint.
        device: `None` is an accelerator if there is one.
    """
    choose("--dtype", dtype, (AS_SAVED, *DTYPES))
    place = find_device(device)
    config = read_config(source, revision)
    options = {"revision": revision, "dtype": DTYPES.get(dtype, dtype)}
    model = _loaded(source, "model", lambda: model_class(config).from_pretrained(source, **options))
    return model.to(place).eval()


def find_device(name: str | None) -> torch.device:
    """A device that is there. Raises `ConfigError` for any other."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return found or torch.device("cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu"] if found is None else ["cpu", found.type]
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--device must be one of {there}; got {name!r} ({reason}).{did_you_mean(name, there)}"
        ) from None


def check_calibrated(model: PreTrainedModel, source: str) -> None:
    """Raise `UncalibratedError` for a model whose layers lack statistics of data."""
    if needs_calibration(model):
        raise UncalibratedError(
            f"The layers of {source!r} need statistics of data, which they do not have yet. Set them first: "
            f"hf-linattn calibrate {source} OUT --inputs FILE"
        )


# -- tokenizers and image processors ----------------------------------------------------------------------------------
def find_processor(model: PreTrainedModel, source: str, revision: str = "main") -> Any:
    """The tokenizer or image processor of a checkpoint; `None` if it has none."""
    auto_class: Any = AutoImageProcessor if takes_images(model) else AutoTokenizer
    try:
        processor = auto_class.from_pretrained(source, revision=revision)
    except (OSError, ValueError):
        return None
    return processor if takes_images(model) or has_vocabulary(processor, source, revision) else None


def has_vocabulary(tokenizer: Any, source: str, revision: str = "main") -> bool:
    """Whether a tokenizer was read from files.

    One whose files are missing is made all the same, with a handful of special tokens.
    """
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    return any(_is_there(source, name, revision) for name in names)


def load_processor(model: PreTrainedModel, source: str, revision: str = "main") -> Any:
    """As `find_processor`. Raises `InputError` if there is none."""
    processor = find_processor(model, source, revision)
    if processor is None:
        what = "image processor" if takes_images(model) else "tokenizer"
        raise InputError(f"There is no {what} in {source!r}. Name where it is: --tokenizer NAME.")
    return processor


def _is_there(source: str, name: str, revision: str) -> bool:
    if Path(source).is_dir():
        return Path(source, name).is_file()
    return isinstance(try_to_load_from_cache(source, name, revision=revision), str)


# -- output folders ---------------------------------------------------------------------------------------------------
def check_output(folder: Path, overwrite: bool) -> None:
    """Raise `InputError` if nothing can be saved there, before any work is done. Makes nothing."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"The output must be a folder; {str(folder)!r} is a file.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"The folder {str(folder)!r} is not empty. Name another one, or give --overwrite to save into it."
        )
    present = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not present.is_dir() or not os.access(present, os.W_OK):
        raise InputError(
            f"Nothing can be written to {str(folder)!r}: {str(present)!r} is not a folder that you may use."
        )


def save(
    model: PreTrainedModel,
    processor: Any,
    folder: Path,
    *,
    beside: Mapping[str, Path] | None = None,
    max_length: int | None = None,
    cards: str | None = None,
    **facts: Any,
) -> None:
    """Save a model with its tokenizer or image processor, and a converted one with a model card.

    Args:
        beside: Files of sentence-transformers (`embedder_files`).
        max_length: Tokens of a text from now on, for these; `None` leaves them as they are.
        cards: Folder with an earlier card of this model: one that a person wrote is kept.
        facts: Of the card (`hf_linattn.hub.render_card`).
    """
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    copy_files(beside or {}, folder, max_length)
    if not is_converted(model.config):
        return
    if cards is not None:
        earlier, card = Path(cards, CARD), folder / CARD
        if earlier.is_file() and not earlier.is_symlink() and not card.exists():
            shutil.copyfile(earlier, card)
    write_card(model, folder, **facts)


# -- errors -----------------------------------------------------------------------------------------------------------
def _loaded(source: str, what: str, load: Callable[[], Any]) -> Any:
    """What `load` returns. Raises `InputError` for what is not there or no checkpoint, in one sentence."""
    try:
        return load()
    except LinAttnError:
        raise
    except (OSError, ValueError) as error:
        if any(_is_unreachable(cause) for cause in _causes(error)):
            raise FailureError(f"The Hub cannot be reached, and {source!r} is not in the cache ({error}).") from error
        raise InputError(f"The {what} {source!r} cannot be loaded: {error}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_unreachable(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
        return error.response.status_code >= 500
    return isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
