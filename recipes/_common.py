"""What the recipes share: the attention flags, reading data sets, results files."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel

import hf_linattn
from hf_linattn.modules.registry import get_kind, list_kinds

logger = logging.getLogger("hf_linattn.recipes")

KEEP, SOFTMAX = "keep", "softmax"
FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
BUILDER_OPTIONS: dict[str, dict[str, Any]] = {".tsv": {"sep": "\t"}, ".txt": {"keep_linebreaks": True}}


class RecipeError(ValueError):
    """A request that cannot be carried out; the message says what to change. Shown to the user without a traceback."""


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


def layer_list(layers: str | None, flag: str) -> list[int] | None:
    """Layers as the user wrote them, as a list of indices; None for all."""
    if layers is None:
        return None
    chosen: set[int] = set()
    try:
        for part in layers.split(","):
            first, _, last = part.partition("-")
            chosen.update(range(int(first), int(last or first) + 1))
    except ValueError:
        raise RecipeError(f"--{flag} must look like '0,1,4-5'; got {layers!r}.") from None
    return sorted(chosen)


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
    streaming: bool = False,
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Splits from the Hub (`dataset_name`) or from local files (split name -> path; None entries are left out).

    Args:
        formats: Suffix of a file -> the builder of `datasets` that reads it.
        streaming: Read rows when they are needed, and store none.
    """
    given = {split: path for split, path in files.items() if path}
    if dataset_name and given:
        raise RecipeError(f"Give --dataset_name or files, not both; got {dataset_name!r} and {given}.")
    if dataset_name:
        return datasets.load_dataset(dataset_name, dataset_config, streaming=streaming)
    if not given:
        raise RecipeError("No data: give --dataset_name or at least one of " + ", ".join(f"--{s}_file" for s in files))
    splits = {}
    for split, path in given.items():
        suffix = Path(path).suffix.lower()
        if suffix not in formats:
            raise RecipeError(f"--{split}_file must be one of {sorted(formats)}; got {path!r}.")
        if not Path(path).is_file():
            raise RecipeError(f"--{split}_file {path!r} does not exist.")
        if Path(path).stat().st_size == 0:
            raise RecipeError(f"--{split}_file {path!r} has no rows.")
        options = {"split": "train", "streaming": streaming, **BUILDER_OPTIONS.get(suffix, {})}
        try:
            splits[split] = datasets.load_dataset(formats[suffix], data_files=path, **options)
        except StopIteration:  # what the reader of JSON says of an empty file
            raise RecipeError(f"--{split}_file {path!r} has no rows.") from None
        except datasets.exceptions.DatasetGenerationError as error:
            raise RecipeError(
                f"--{split}_file {path!r} cannot be read as {formats[suffix]}: {error.__cause__ or error}"
            ) from error
    return datasets.IterableDatasetDict(splits) if streaming else datasets.DatasetDict(splits)


def find_column(columns: Sequence[str], wanted: str | None, usual: Sequence[str], flag: str) -> str:
    """The column the user named, else the first usual one that exists."""
    if wanted is not None:
        if wanted not in columns:
            raise RecipeError(f"--{flag} {wanted!r} is not a column of the data; columns: {list(columns)}.")
        return wanted
    for name in usual:
        if name in columns:
            return name
    raise RecipeError(
        f"No column is called {' or '.join(map(repr, usual))}; columns: {list(columns)}. "
        f"Name the right one with --{flag}."
    )


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
    """Run a recipe's `main` as a program: mistakes of the user end it with their message alone, status 2."""
    try:
        main()
    except (RecipeError, hf_linattn.errors.LinAttnError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        # Without this some runs of several processes crash on exit, after all the work is done.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
