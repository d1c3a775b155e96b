"""The data of a labelled task: which splits a run reads, and how much of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers import TrainingArguments

from hf_linattn.data.files import UNREADABLE, column_names

from .common import RecipeError, load_splits, refuse_idle_flags

FORMATS_HELP = "parquet, csv, tsv, json or jsonl"
SPLITS = ("train", "validation", "test")

Data = datasets.Dataset | datasets.IterableDataset


@dataclass
class DataArguments:
    """Which data, and how much of it."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or a local folder"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration"})
    train_file: str | None = field(default=None, metadata={"help": FORMATS_HELP})
    validation_file: str | None = field(default=None, metadata={"help": FORMATS_HELP})
    test_file: str | None = field(default=None, metadata={"help": f"{FORMATS_HELP}; for --do_predict"})
    streaming: bool = field(
        default=False, metadata={"help": "Read training rows when they are needed, and store none; needs --max_steps"}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "With --streaming: rows that are shuffled at a time"})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first so many"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first so many"})
    from_scratch: bool = field(default=False, metadata={"help": "Ignore checkpoints that are in the output folder"})

    def __post_init__(self) -> None:
        for name in ("shuffle_buffer", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"--{name} must be at least 1; got {value}.")
        refuse_idle_flags(self, {"streaming": ["shuffle_buffer"], "dataset_name": ["dataset_config_name"]})

    def complete(self, splits: Mapping[str, Data]) -> Mapping[str, Data]:
        """The splits there are, and those that the recipe makes of them."""
        return splits


def read_splits(
    args: DataArguments,
    training: TrainingArguments,
    names: Mapping[str, Sequence[str]] | None = None,
    given: Mapping[str, Data] | None = None,
    **options: Any,
) -> dict[str, Data]:
    """The splits that the run needs, each cut to its maximal size: train, validation, test.

    Args:
        names: Split -> what it is called in the data, where that is another name. A second one becomes a split of its
            own: "validation_mismatched" is scored after "validation".
        given: Splits that were read already, from something else than files and the Hub.
        options: Of `load_splits`, such as the formats of files.
    """
    wanted = {
        "train": (training.do_train, args.max_train_samples),
        "validation": (training.do_eval, args.max_eval_samples),
        "test": (training.do_predict, args.max_predict_samples),
    }
    if not any(is_wanted for is_wanted, _ in wanted.values()):
        raise RecipeError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    if args.streaming and training.do_train and training.max_steps < 1:
        raise RecipeError("--streaming needs --max_steps: nobody knows how many rows a stream has.")
    with training.main_process_first(desc="reading the data"):
        found = args.complete(given or _load(args, **options))
    chosen: dict[str, Data] = {}
    for split, (is_wanted, limit) in wanted.items():
        for number, name in enumerate((names or {}).get(split, (split,))):
            if not is_wanted:
                continue
            if name not in found:
                raise RecipeError(f"The run needs {name} data, but there is only {list(found)}. Give --{split}_file.")
            rows = first_rows(found[name], limit)
            if is_empty(rows, name):
                raise RecipeError(f"The {name} data has no rows.")
            chosen[name if number else split] = rows
    return chosen


def _load(args: DataArguments, **options: Any) -> Mapping[str, Data]:
    """All splits there are; with `--streaming` that of training as a stream."""
    files = {split: getattr(args, f"{split}_file") for split in SPLITS}
    if not args.streaming:
        return load_splits(files, args.dataset_name, args.dataset_config_name, **options)
    streams = load_splits(files, args.dataset_name, args.dataset_config_name, streaming=True, **options)
    return {split: data if split == "train" else _stored(data) for split, data in streams.items()}


def _stored(stream: datasets.IterableDataset) -> datasets.Dataset:
    return datasets.Dataset.from_generator(lambda: iter(stream), features=stream.features)


def is_stream(data: Data) -> bool:
    return isinstance(data, datasets.IterableDataset)


def is_empty(data: Data, split: str) -> bool:
    """Whether there are no rows. Raises: RecipeError for a stream that cannot be read."""
    try:
        return next(iter(data), None) is None
    except UNREADABLE as error:
        raise RecipeError(f"The {split} data cannot be read: {error}") from error


def first_rows(data: Data, number: int | None) -> Data:
    """The first so many rows; all of them with None."""
    if number is None:
        return data
    return data.take(number) if is_stream(data) else data.select(range(min(number, len(data))) or [])


def encode(splits: Mapping[str, Data], function: Any, training: TrainingArguments, what: str) -> dict[str, Data]:
    """Every split through `Dataset.map` in batches, with the columns that the function returns and no others."""
    with training.main_process_first(desc=what):
        return {
            split: data.map(
                function,
                batched=True,
                remove_columns=column_names(data),
                **({} if is_stream(data) else {"desc": f"{what.capitalize()} {split}"}),
            )
            for split, data in splits.items()
        }
