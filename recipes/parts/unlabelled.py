"""Inputs without labels: texts joined and cut into rows of one length, or images. Of files, the Hub, or a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, default_data_collator

from hf_linattn.data.files import IMAGE_FORMATS, TEXT_FORMATS, load_images
from hf_linattn.data.rows import IMAGE_NAMES, TEXT_NAMES, ImageCollator, only_images, packed
from hf_linattn.integrations.families import takes_images

from .common import RecipeError, load_splits, refuse_idle_flags
from .data import Data, first_rows, is_stream
from .text import choose_max_length

OF_TEXT = ("text_column", "max_length")
OF_IMAGES = ("train_dir", "validation_dir", "image_column")
FILE_HELP = "parquet, csv, tsv, json, jsonl or txt; images: parquet"


@dataclass
class UnlabelledArguments:
    """Which data, and how it is read."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or a local folder"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration"})
    train_file: str | None = field(default=None, metadata={"help": FILE_HELP})
    validation_file: str | None = field(default=None, metadata={"help": FILE_HELP})
    train_dir: str | None = field(default=None, metadata={"help": "A folder of images, with folders in it or without"})
    validation_dir: str | None = field(default=None, metadata={"help": "A folder of images"})
    data_name: str | None = field(default=None, metadata={"help": "For the model card, if the data is local"})
    text_column: str | None = field(default=None, metadata={"help": f"Default: the first of {', '.join(TEXT_NAMES)}"})
    image_column: str | None = field(
        default=None, metadata={"help": f"Default: the first of {', '.join(IMAGE_NAMES)}"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of every row (default: the positions of the model)"}
    )
    streaming: bool = field(default=False, metadata={"help": "Read rows when they are needed, and store none"})
    shuffle_buffer: int = field(default=1000, metadata={"help": "With --streaming: rows that are shuffled at a time"})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many rows"})
    max_eval_samples: int = field(
        default=32,
        metadata={"help": "Rows to compare on; without validation data the first so many, kept out of training"},
    )
    calibration_samples: int = field(
        default=64, metadata={"help": "Training rows that set the statistics of a kind that needs them"}
    )
    from_scratch: bool = field(default=False, metadata={"help": "Ignore checkpoints that are in the output folder"})

    def __post_init__(self) -> None:
        for name in ("shuffle_buffer", "max_train_samples", "max_eval_samples", "calibration_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"--{name} must be at least 1; got {value}.")
        refuse_idle_flags(self, {"streaming": ["shuffle_buffer"], "dataset_name": ["dataset_config_name"]})

    @property
    def source(self) -> str:
        """The data by name, for people: without the folders of this machine."""
        if self.data_name or not self.dataset_name:
            return self.data_name or Path(self.train_file or self.train_dir or "").name
        return f"{self.dataset_name} ({self.dataset_config_name})" if self.dataset_config_name else self.dataset_name


@dataclass
class Rows:
    """What a run reads.

    Args:
        train: Rows to train on; of a stream, without end.
        calibration, held_out: Of the training data, and rows that are not in it.
        collate: From a list of rows to inputs of the model.
        unit: What a row is, for people.
    """

    train: Data
    calibration: Sequence[Any]
    held_out: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Any]]
    unit: str


def read_rows(model: PreTrainedModel, processor: Any, args: UnlabelledArguments, seed: int) -> Rows:
    """Rows for a model of text or of images, training rows and held-out ones.

    Args:
        processor: The model's tokenizer or image processor.
        seed: Of the order of a stream.
    """
    images = takes_images(model)
    _check_flags(model, args, OF_TEXT if images else OF_IMAGES)
    splits = _read_splits(args, images)
    if images:
        splits = {name: only_images(data, args.image_column, "image_column") for name, data in splits.items()}
        collate: Callable[[list[Any]], dict[str, Any]] = ImageCollator(processor, model.config.num_channels)
        unit = "images"
    else:
        max_length = choose_max_length(args.max_length, processor, model.config)
        splits = {
            name: packed(data, args.text_column, processor, max_length, "text_column") for name, data in splits.items()
        }
        collate, unit = default_data_collator, f"rows of {max_length} tokens"
    train = splits["train"]
    if "validation" in splits:
        held_out = _first(splits["validation"], args.max_eval_samples)
    else:
        held_out, train = _first(train, args.max_eval_samples), _skip(train, args.max_eval_samples)
    if args.max_train_samples is not None:
        train = first_rows(train, args.max_train_samples)
    calibration = _first(train, args.calibration_samples)
    for name, found in (("train", calibration), ("validation", held_out)):
        if not len(found):
            kept = "" if "validation" in splits else f", beside the {len(held_out)} that are kept out of training"
            raise RecipeError(
                f"The {name} data gives no {unit}{kept}. Give more data, a validation set, a smaller --max_length or "
                "a smaller --max_eval_samples."
            )
    if args.streaming:
        train = train.shuffle(seed=seed, buffer_size=args.shuffle_buffer).repeat(None)
    return Rows(train, calibration, held_out, collate, unit)


def _check_flags(model: PreTrainedModel, args: UnlabelledArguments, wrong: Sequence[str]) -> None:
    for name in wrong:
        if getattr(args, name) is not None:
            what = "texts" if wrong is OF_IMAGES else "images"
            raise RecipeError(f"--{name} is of no use here: {type(model).__name__} takes {what}.")


def _read_splits(args: UnlabelledArguments, images: bool) -> Mapping[str, Data]:
    """The train split, and the validation split if there is one."""
    folders = {"train": args.train_dir, "validation": args.validation_dir}
    files = {"train": args.train_file, "validation": args.validation_file}
    given = {split: path for split, path in folders.items() if path}
    if given:
        if args.dataset_name or any(files.values()):
            raise RecipeError("Give folders of images, files or --dataset_name, not several of them.")
        splits = {
            split: load_images(path, f"--{split}_dir", streaming=args.streaming) for split, path in given.items()
        }
    else:
        formats = IMAGE_FORMATS if images else TEXT_FORMATS
        splits = load_splits(
            files, args.dataset_name, args.dataset_config_name, formats=formats, streaming=args.streaming
        )
    if "train" not in splits:
        raise RecipeError(f"The run needs train data, but there is only {list(splits)}. Give --train_file.")
    return {name: splits[name] for name in ("train", "validation") if name in splits}


# -- data sets and streams --------------------------------------------------------------------------------------------
def _skip(data: Data, number: int) -> Data:
    return data.skip(number) if is_stream(data) else data.select(range(number, len(data)) or [])


def _first(data: Data, number: int) -> Sequence[Any]:
    """The first rows, by index."""
    found = first_rows(data, number)
    return list(found) if is_stream(data) else found
