"""Inputs of a command, as a stream of batches: nothing is stored, and it can be read again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, DefaultDataCollator, PreTrainedModel

from ..data.files import IMAGE_FORMATS, TEXT_FORMATS, UNREADABLE, be_quiet, check_paths, load_files, load_images
from ..data.rows import ImageCollator, choose_max_length, one_by_one, only_images, packed
from ..errors import InputError, LinAttnError
from ..integrations.families import takes_images

SHUFFLE_BUFFER = 1000  # rows


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
        rows: The stream, an `IterableDataset` of `datasets`.
        collate: From a list of rows to inputs of the model.
        batch_size: Rows of a batch.
        unit: What a row is, for people.
        source: Where the rows come from, for people.
        held_out: First rows of the files that are left out.
        most: Rows at most, where that is known.
    """

    rows: Any
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
    be_quiet()
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


def _read(paths: Sequence[str], formats: Mapping[str, str]) -> Any:
    """A stream of the rows of all files."""
    if any(Path(path).is_dir() for path in paths):
        if formats is not IMAGE_FORMATS or len(paths) > 1:
            raise InputError(f"--inputs must be files ({', '.join(formats)}); got {paths[0]!r}, a folder.")
        return load_images(paths[0], "--inputs", streaming=True)
    return load_files(paths, "--inputs", formats, streaming=True)
