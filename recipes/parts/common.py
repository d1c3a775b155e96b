"""What the recipes share: the attention flags, reading data sets, results files."""

from __future__ import annotations

import errno
import gc
import importlib.metadata
import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel

import hf_linattn
from hf_linattn.cli.values import layer_list
from hf_linattn.data.files import BUILDER_OPTIONS, TEXT_FORMATS, UNREADABLE, load_files
from hf_linattn.modules.registry import get_kind, list_kinds

logger = logging.getLogger("hf_linattn.recipes")

KEEP, SOFTMAX = "keep", "softmax"
# Flags that say how the kind of `--attention` works.
KIND_SETTINGS = ("window_size", "num_features", "num_landmarks", "attention_config")
FORMATS = {suffix: builder for suffix, builder in TEXT_FORMATS.items() if suffix != ".txt"}  # of tables

# What a full disk, a quota or limit, and a folder that is not to be written to say.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class RecipeError(ValueError):
    """A request that cannot be carried out; the message says what to change. Shown to the user without a traceback."""


def refuse_idle_flags(args: Any, needed: Mapping[str, Sequence[str]]) -> None:
    """Refuse flags that do nothing without another one.

    Args:
        args: The flags, a dataclass.
        needed: Flag -> flags that do nothing without it.
    Raises: RecipeError that names both.
    """
    defaults = {each.name: each.default for each in fields(args)}
    for flag, names in needed.items():
        for name in names if not getattr(args, flag) else ():
            if getattr(args, name) != defaults[name]:
                raise RecipeError(f"--{name} {getattr(args, name)} does nothing without --{flag}. Give both or none.")


# -- attention --------------------------------------------------------------------------------------------------------
@dataclass
class AttentionArguments:
    """Which attention the model gets."""

    attention: str = field(
        default=KEEP,
        metadata={
            "help": f"'{KEEP}' (as the checkpoint has it), '{SOFTMAX}' (the stock model; reverts a converted "
            f"checkpoint) or a kind to convert to: {', '.join(list_kinds())}"
        },
    )
    window_size: int | None = field(default=None, metadata={"help": "Tokens in the exact local window"})
    num_features: int | None = field(default=None, metadata={"help": "Random features (favor_plus, favor_sharp)"})
    num_landmarks: int | None = field(default=None, metadata={"help": "Landmarks (lara)"})
    attention_config: str | None = field(
        default=None, metadata={"help": "Any settings of the kind as JSON, for example '{\"slot_dropout\": 0.1}'"}
    )
    layers: str | None = field(
        default=None, metadata={"help": "Layers to convert, for example '0,1,4-5' (default: all of them)"}
    )

    def __post_init__(self) -> None:
        if self.attention not in (KEEP, SOFTMAX):
            get_kind(self.attention)  # raises for an unknown name, naming near misses
        elif given := self.settings():
            raise RecipeError(
                f"--attention {self.attention} takes no settings; got {given}. Name a kind: {', '.join(list_kinds())}."
            )
        elif self.layers is not None:
            raise RecipeError(
                f"--layers are those that a kind converts; --attention {self.attention} converts none. Name a kind: "
                f"{', '.join(list_kinds())}."
            )

    def settings(self) -> dict[str, Any]:
        """The kind's settings that were given, by name."""
        try:
            values = json.loads(self.attention_config) if self.attention_config else {}
        except json.JSONDecodeError as error:
            raise RecipeError(f"--attention_config must be JSON; got {self.attention_config!r} ({error}).") from None
        if not isinstance(values, dict):
            raise RecipeError(f"--attention_config must be a JSON object; got {self.attention_config!r}.")
        for name in ("window_size", "num_features", "num_landmarks"):
            value = getattr(self, name)
            if value is None:
                continue
            if name in values and values[name] != value:
                raise RecipeError(f"--{name} {value} contradicts {name!r}: {values[name]} in --attention_config.")
            values[name] = value
        return values


def linear_attention_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """The model's `linear_attention` settings; None for a stock model."""
    return getattr(model.config, "linear_attention", None)


def apply_attention(model: PreTrainedModel, args: AttentionArguments, **defaults: Any) -> PreTrainedModel:
    """Convert, revert or leave the model, as `args` says; `defaults` are settings that it does not name."""
    present = linear_attention_of(model)
    if args.attention == KEEP:
        return model
    if args.attention == SOFTMAX:
        return hf_linattn.revert(model) if present else model
    if present:
        raise RecipeError(
            f"The checkpoint is converted to {present['kind']!r} already. Use --attention {KEEP} to go on with it, or "
            f"--attention {SOFTMAX} to go back to softmax."
        )
    config = get_kind(args.attention).config_cls(**{**defaults, **args.settings()})
    return hf_linattn.convert(model, config, layers=layer_list(args.layers, "layers"))


# -- data -------------------------------------------------------------------------------------------------------------
def load_splits(
    files: Mapping[str, str | None],
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    *,
    formats: Mapping[str, str] = FORMATS,
    builder_options: Mapping[str, Mapping[str, Any]] = BUILDER_OPTIONS,
    streaming: bool = False,
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Splits from the Hub (`dataset_name`) or from local files (split name -> path; None entries are left out).

    Args:
        formats: Suffix of a file -> the builder of `datasets` that reads it.
        builder_options: Suffix of a file -> options of that builder.
        streaming: Read rows when they are needed, and store none.
    """
    given = {split: path for split, path in files.items() if path}
    if dataset_name and given:
        raise RecipeError(f"Give --dataset_name or files, not both; got {dataset_name!r} and {given}.")
    if dataset_name:
        try:
            return datasets.load_dataset(dataset_name, dataset_config, streaming=streaming)
        except (datasets.exceptions.DatasetGenerationError, *UNREADABLE) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise RecipeError(f"--dataset_name {dataset_name!r} cannot be read: {reason}") from error
    if not given:
        raise RecipeError("No data: give --dataset_name or at least one of " + ", ".join(f"--{s}_file" for s in files))
    splits = {
        split: load_files([path], f"--{split}_file", formats, builder_options, streaming=streaming)
        for split, path in given.items()
    }
    return datasets.IterableDatasetDict(splits) if streaming else datasets.DatasetDict(splits)


# -- results ----------------------------------------------------------------------------------------------------------
def versions() -> dict[str, str]:
    """Versions that a measurement depends on, and the device."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    for package in ("hf-linattn", "datasets", "accelerate"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return found


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write a results file; values that JSON does not know are written as text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    return path


def run(main: Any) -> None:
    """Run a recipe's `main` as a program.

    Mistakes of the user, and a disk that takes no more, end it with their message alone and status 2; Ctrl-C with 130.
    """
    try:
        main()
    except (RecipeError, hf_linattn.errors.LinAttnError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(
            f"error: {error.filename or 'A file'} could not be written: {os.strerror(error.errno)}.", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("Ctrl-C: stopped. The same command line goes on from the last complete checkpoint.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        # Without this some runs of several processes crash on exit, after all the work is done. A group's threads end
        # with the last reference to it, and a trainer refers to itself: what is left of it is collected.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            if sys.exc_info()[0] is None:  # a launcher does not wait long for the others after one that failed
                gc.collect()
