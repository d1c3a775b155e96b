"""Inputs without labels, read as a stream: texts joined and cut into rows of one length, or one by one, or images."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, DefaultDataCollator, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError, InputError, LinAttnError
from .checkpoints import takes_images

try:
    import datasets
    import pyarrow as pa
except ImportError as error:
    raise ConfigError(
        "Reading inputs needs datasets, which is not installed: pip install 'hf-linattn[cli]'"
    ) from error

TEXT_NAMES = ("text", "sentence", "content", "document", "sentence1", "premise", "question1", "question")
IMAGE_NAMES = ("image", "img")
# Suffix of a file -> the builder of `datasets` that reads it.
IMAGE_FORMATS = {".parquet": "parquet"}
TEXT_FORMATS = {**IMAGE_FORMATS, ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
BUILDER_OPTIONS: dict[str, dict[str, Any]] = {".tsv": {"sep": "\t"}, ".txt": {"keep_linebreaks": True}}
# Modes of Pillow with 8 bits a channel that become RGB or grey without surprise.
EIGHT_BIT_MODES = ("RGB", "L", "1", "P", "LA", "PA", "RGBA", "RGBX", "La", "RGBa")
SHUFFLE_BUFFER = 1000  # rows
# What reading raises for a file, or a column, of something else.
UNREADABLE = (pa.ArrowException, ValueError, TypeError, OSError)


@dataclass(frozen=True)
class InputOptions:
    """How a command was told to read its inputs.

    Args:
        inputs: Files of one format, patterns of such with *, or one folder of images.
        column: With the texts or images; by default the first that has a usual name.
        max_length: Tokens of a row; by default as many as the model has positions.
        pack: Join texts and cut them into rows of `max_length` tokens; otherwise every text is a row.
        batch_size: Rows of a batch.
    Raises: `InputError` for a file or folder that is not there.
    """

    inputs: Sequence[str]
    column: str | None
    max_length: int | None
    pack: bool
    batch_size: int

    def __post_init__(self) -> None:
        check_paths(self.inputs, "--inputs")


@dataclass(frozen=True)
class Inputs:
    """Rows of a stream, as batches for a model. Nothing is stored, and it can be read again.

    Args:
        rows: The stream.
        collate: From a list of rows to inputs of the model.
        batch_size: Rows of a batch.
        unit: What a row is, for people.
        source: Where the rows come from, for people.
        held_out: First rows of the files that are left out.
        most: Rows at most, where that is known.
    """

    rows: datasets.IterableDataset
    collate: Callable[[list[Any]], Mapping[str, Any]]
    batch_size: int
    unit: str
    source: str
    held_out: int = 0
    most: int | None = None

    def __len__(self) -> int:
        """Batches at most, for a progress bar."""
        if self.most is None:
            raise TypeError("nobody knows how many rows a stream has")
        return math.ceil(self.most / self.batch_size)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        try:
            yield from DataLoader(self.rows, batch_size=self.batch_size, collate_fn=self.collate)
        except LinAttnError:
            raise
        except UNREADABLE as error:
            raise InputError(f"--inputs {self.source!r} cannot be read: {error}") from error

    def first(self, number: int) -> Inputs:
        """The first rows alone. Raises `InputError` if there is none."""
        found = replace(self, rows=self.rows.take(number), most=number)
        if next(iter(found), None) is None:
            beside = f" beside the {self.held_out} that are held out" if self.held_out else ""
            raise InputError(f"--inputs {self.source!r} gives no {self.unit}{beside}. Give more, or shorter rows.")
        return found

    def after(self, number: int) -> Inputs:
        """All rows but the first ones."""
        return replace(self, rows=self.rows.skip(number), held_out=number)

    def shuffled(self, seed: int) -> Inputs:
        return replace(self, rows=self.rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))

    def endless(self) -> Inputs:
        """The rows again and again."""
        return replace(self, rows=self.rows.repeat(None))


def read_inputs(model: PreTrainedModel, processor: Any, options: InputOptions) -> Inputs:
    """Rows for a model of text or of images.

    Args:
        processor: The model's tokenizer or image processor.
    Raises: `InputError` for what cannot be read as such.
    """
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are told here, once
    collate: Callable[[list[Any]], Mapping[str, Any]]
    if takes_images(model):
        for name, is_given in {"--max-length": options.max_length is not None, "--no-pack": not options.pack}.items():
            if is_given:
                raise InputError(f"{name} is for texts: {type(model).__name__} takes images.")
        rows, unit = only_images(_read(options.inputs, IMAGE_FORMATS), options.column, "column"), "images"
        collate = ImageCollator(processor, model.config.num_channels)
    else:
        length = choose_max_length(options.max_length, processor, model.config, "max-length")
        texts = _read(options.inputs, TEXT_FORMATS)
        if options.pack:
            rows, unit = packed(texts, options.column, processor, length, "column"), f"rows of {length} tokens"
            collate = DefaultDataCollator()
        else:
            rows = one_by_one(texts, options.column, processor, length, "column")
            unit = f"texts of at most {length} tokens"
            if processor.pad_token is None:
                processor.pad_token = processor.eos_token  # masked wherever it stands
            collate = DataCollatorWithPadding(processor)
    source = ", ".join(Path(path).name for path in options.inputs)
    return Inputs(rows, collate, options.batch_size, unit, source)


# -- files ------------------------------------------------------------------------------------------------------------
def _read(paths: Sequence[str], formats: Mapping[str, str]) -> datasets.IterableDataset:
    """A stream of the rows of all files."""
    if any(Path(path).is_dir() for path in paths):
        if formats is not IMAGE_FORMATS or len(paths) > 1:
            raise InputError(f"--inputs must be files ({', '.join(formats)}); got {paths[0]!r}, a folder.")
        return load_images(paths[0], "--inputs", streaming=True)
    return load_files(paths, "--inputs", formats, streaming=True)


def check_paths(paths: Sequence[str], flag: str) -> None:
    """Raise `InputError` for a file or folder that is not there, and a pattern that fits none."""
    for path in paths:
        if "://" not in path and not glob.glob(path, recursive=True) and not Path(path).exists():
            raise InputError(f"{flag} {path!r} does not exist.")


def load_files(
    paths: Sequence[str],
    flag: str,
    formats: Mapping[str, str],
    builder_options: Mapping[str, Mapping[str, Any]] = BUILDER_OPTIONS,
    *,
    streaming: bool = False,
) -> Any:
    """The rows of files of one format, or of what patterns with * name.

    Args:
        flag: What the user gave them with, for errors.
        formats: Suffix of a file -> the builder of `datasets` that reads it.
        builder_options: Suffix of a file -> options of that builder.
        streaming: Read rows when they are needed, and store none.
    """
    suffixes = {Path(path).suffix.lower() for path in paths}
    for path in paths:
        if Path(path).suffix.lower() not in formats:
            raise InputError(f"{flag} must be one of {sorted(formats)}; got {path!r}.")
    if len(suffixes) > 1:
        raise InputError(f"{flag} must be files of one format; got {sorted(suffixes)}.")
    check_paths(paths, flag)
    suffix = suffixes.pop()
    options = {"split": "train", "streaming": streaming, **builder_options.get(suffix, {})}
    return _loaded(formats[suffix], flag, ", ".join(paths), data_files=list(paths), **options)


def load_images(folder: str, flag: str, *, streaming: bool = False) -> Any:
    """The images in a folder, and in folders in it, without labels."""
    if not Path(folder).is_dir():
        raise InputError(f"{flag} must be a folder of images; {folder!r} is none.")
    options = {"data_files": f"{folder}/**", "split": "train", "drop_labels": True, "streaming": streaming}
    return _loaded("imagefolder", flag, folder, **options)


def _loaded(builder: str, flag: str, source: str, **options: Any) -> Any:
    try:
        return datasets.load_dataset(builder, **options)
    except StopIteration:  # of an empty file, within `datasets`
        raise InputError(f"{flag} {source!r} has no rows.") from None
    except (datasets.exceptions.DatasetGenerationError, *UNREADABLE) as error:
        empty = isinstance(error.__cause__, datasets.arrow_writer.SchemaInferenceError)  # a file of text
        if empty or "BatchSize must be greater than 0" in str(error.__cause__ or error):  # a file of parquet
            raise InputError(f"{flag} {source!r} has no rows.") from None
        raise InputError(f"{flag} {source!r} cannot be read as {builder}: {error.__cause__ or error}") from error


# -- columns ----------------------------------------------------------------------------------------------------------
def column_names(rows: Any) -> list[str]:
    """Names of the columns; those of a stream may be known from its first row only. Raises `InputError` without."""
    try:
        names = list(rows.column_names or next(iter(rows), {}))
    except UNREADABLE as error:
        raise InputError(f"The inputs cannot be read: {error}") from error
    if not names:
        raise InputError("The inputs have no rows.")
    return names


def find_column(columns: Sequence[str], wanted: str | None, usual: Sequence[str], flag: str) -> str:
    """The column the user named, else the first usual one that exists."""
    if wanted is not None:
        if wanted not in columns:
            raise InputError(f"--{flag} {wanted!r} is not a column of the data; columns: {list(columns)}.")
        return wanted
    for name in usual:
        if name in columns:
            return name
    raise InputError(
        f"No column is called {' or '.join(map(repr, usual))}; columns: {list(columns)}. "
        f"Name the right one with --{flag}."
    )


# -- texts ------------------------------------------------------------------------------------------------------------
def choose_max_length(wanted: int | None, tokenizer: PreTrainedTokenizerBase, config: Any, flag: str) -> int:
    """How many tokens a row has: what the user wants, checked against the positions of the model, or all of them."""
    limit = getattr(config, "max_position_embeddings", None)
    if wanted is not None and limit is not None and wanted > limit:
        raise InputError(
            f"--{flag} must be at most {limit}, the number of positions the model has; got {wanted}. Extend the "
            "positions of the checkpoint first."
        )
    return wanted or min(limit or 512, tokenizer.model_max_length)


def packed(data: Any, column: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int, flag: str) -> Any:
    """Rows of `max_length` tokens: the texts one after the other, a line break after each that has none.

    A thousand texts at a time are joined and cut, with the special tokens of the model in every row; what is left at
    the end of them is dropped.
    """
    if not tokenizer.is_fast:
        raise InputError(f"A fast tokenizer cuts texts into rows; {type(tokenizer).__name__} is none.")

    def pack(texts: list[str]) -> dict[str, list[Any]]:
        joined = "".join(text if text.endswith("\n") else text + "\n" for text in texts)
        options = {"truncation": True, "max_length": max_length, "return_overflowing_tokens": True}
        found = tokenizer(joined, **options)["input_ids"]
        return {"input_ids": [ids for ids in found if len(ids) == max_length]}

    return _of_texts(data, column, flag, pack)


def one_by_one(data: Any, column: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int, flag: str) -> Any:
    """A row for every text that is not empty, cut after `max_length` tokens."""

    def encode(texts: list[str]) -> dict[str, list[Any]]:
        texts = [text for text in texts if text.strip()]
        if not texts:
            return {"input_ids": []}
        return {"input_ids": tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]}

    return _of_texts(data, column, flag, encode)


def _of_texts(data: Any, column: str | None, flag: str, encode: Callable[[list[str]], dict[str, list[Any]]]) -> Any:
    """Every thousand texts through `encode`; other columns are left out."""
    columns = column_names(data)
    name = find_column(columns, column, TEXT_NAMES, flag)

    def from_rows(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if any(not isinstance(text, str) for text in rows[name]):
            raise InputError(f"Column {name!r} has values that are not text, or are missing.")
        return encode(rows[name])

    return data.map(from_rows, batched=True, remove_columns=columns)


# -- images -----------------------------------------------------------------------------------------------------------
@dataclass
class ImageCollator:
    """From rows with an image each to the pixels that the model takes."""

    processor: Any
    num_channels: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "RGB" if self.num_channels == 3 else "L"
        for row in rows:
            if row["image"].mode not in EIGHT_BIT_MODES:
                raise InputError(
                    f"An image has the mode {row['image'].mode!r}; the model takes 8 bits of colour or grey. Convert "
                    "it to RGB or L as its maker meant it."
                )
        return dict(self.processor([row["image"].convert(mode) for row in rows], return_tensors="pt"))


def only_images(data: Any, column: str | None, flag: str) -> Any:
    """The column of images alone, as `image`."""
    column = find_column(column_names(data), column, IMAGE_NAMES, flag)
    data = data.select_columns([column])
    try:
        data = data.cast_column(column, datasets.Image())
    except UNREADABLE as error:
        raise InputError(f"Column {column!r} does not hold images: {error}") from error
    return data if column == "image" else data.rename_column(column, "image")
