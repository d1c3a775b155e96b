"""The five tasks: which columns they read, what becomes of a row, how long it may be."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from hf_linattn.data.files import BUILDER_OPTIONS, find_column
from hf_linattn.data.rows import EIGHT_BIT_MODES, IMAGE_NAMES, TEXT_NAMES
from parts.common import RecipeError
from parts.text import LABEL_NAMES

from .tokens import byte_tokenizer, grey_ids, listops_tokenizer

# The published pairs of papers have no header and no quoting.
PAIRS = {".tsv": {"sep": "\t", "names": ["label", "id1", "id2", "text1", "text2"], "quoting": csv.QUOTE_NONE}}


@dataclass
class ColumnArguments:
    """Where inputs and labels are; by default under the names of the published files and of the Hub."""

    input_column: str | None = field(default=None, metadata={"help": "Of texts or images"})
    second_input_column: str | None = field(default=None, metadata={"help": "matching: of the other texts"})
    label_column: str | None = field(default=None, metadata={"help": "Of whole numbers"})


@dataclass(frozen=True)
class ArenaTask:
    """One of the tasks.

    Args:
        inputs: Usual names of the column of each input: one, or two that go through the same encoder.
        label: Usual names of the column of labels.
        num_labels: Labels are 0 to num_labels - 1.
        max_length: Tokens of an input in Long Range Arena; longer texts are cut there.
        tokenizer: From `max_length` to the tokenizer.
        has_images: Whether the inputs are images, of which every grey level is a token.
        reading: Options of `load_splits` for the published files.
    """

    inputs: tuple[Sequence[str], ...]
    label: Sequence[str]
    num_labels: int
    max_length: int
    tokenizer: Callable[[int], PreTrainedTokenizerFast] = byte_tokenizer
    has_images: bool = False
    reading: Mapping[str, Any] = field(default_factory=dict)

    def columns(self, names: Sequence[str], args: ColumnArguments) -> tuple[list[str], str]:
        """The columns of the inputs and of the label among those of the data: as named, else the first usual ones.

        Raises: RecipeError if there is none.
        """
        named = (args.input_column, args.second_input_column)
        flags = ("input_column", "second_input_column")
        inputs = [find_column(names, *each) for each in zip(named, self.inputs, flags, strict=False)]
        return inputs, find_column(names, args.label_column, self.label, "label_column")


OF_IMAGES = {"formats": {".parquet": "parquet"}}
TASKS = {
    "listops": ArenaTask((("source", "Source"),), ("target", "Target", "label"), 10, 2000, listops_tokenizer),
    "text": ArenaTask((TEXT_NAMES,), LABEL_NAMES, 2, 4000),
    "matching": ArenaTask(
        (("text1",), ("text2",)), LABEL_NAMES, 2, 4000, reading={"builder_options": {**BUILDER_OPTIONS, **PAIRS}}
    ),
    "image": ArenaTask((IMAGE_NAMES,), LABEL_NAMES, 10, 1024, has_images=True, reading=OF_IMAGES),
    "pathfinder": ArenaTask((IMAGE_NAMES,), LABEL_NAMES, 2, 1024, has_images=True, reading=OF_IMAGES),
}


# -- rows -------------------------------------------------------------------------------------------------------------
def encoder_of(
    task: ArenaTask, tokenizer: PreTrainedTokenizerFast, max_length: int, inputs: Sequence[str], label: str
) -> Callable[[dict[str, list]], dict[str, list]]:
    """What turns a batch of rows into token ids `[inputs][tokens]`, labels and lengths.

    The function raises RecipeError for inputs that are missing or not of the task, and for labels out of range.
    """

    def encode(rows: dict[str, list]) -> dict[str, list]:
        ids_of = partial(_grey_ids, max_length) if task.has_images else partial(_text_ids, tokenizer, max_length)
        by_input = [[ids_of(name, value) for value in rows[name]] for name in inputs]
        ids = [list(each) for each in zip(*by_input, strict=True)]
        return {
            "input_ids": ids,
            "label": [_label(value, label, task.num_labels) for value in rows[label]],
            "length": [max(map(len, each)) for each in ids],
        }

    return encode


def _text_ids(tokenizer: PreTrainedTokenizerFast, max_length: int, column: str, text: Any) -> list[int]:
    if not isinstance(text, str) or not text:
        raise RecipeError(f"Column {column!r} must hold texts, and none that is empty; got {text!r}.")
    encoded = tokenizer(text, truncation=True, max_length=max_length)
    ids = encoded["input_ids"]
    if tokenizer.unk_token_id in ids:
        first, last = encoded.encodings[0].offsets[ids.index(tokenizer.unk_token_id)]
        word = text[first:last]
        raise RecipeError(f"Column {column!r} has a word that is none of ListOps: {word!r} in {text[:40]!r}...")
    return ids


def _grey_ids(max_length: int, column: str, stored: Any) -> list[int]:
    try:
        image = stored if isinstance(stored, Image.Image) else Image.open(BytesIO(stored["bytes"]))
        image.load()
    except (KeyError, TypeError, OSError) as error:
        raise RecipeError(f"Column {column!r} has a row that is no image: {error!r}.") from error
    if image.mode not in EIGHT_BIT_MODES:
        raise RecipeError(
            f"Column {column!r} has an image of mode {image.mode!r}; the task takes 8 bits of colour or grey. Convert "
            "it to RGB or L as its maker meant it."
        )
    if image.width * image.height > max_length:
        raise RecipeError(
            f"Column {column!r} has an image of {image.width} x {image.height} pixels; --max_length allows "
            f"{max_length} tokens, of which each is a pixel."
        )
    return grey_ids(image)


def _label(value: Any, column: str, num_labels: int) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < num_labels or number != float(value):
        raise RecipeError(f"Column {column!r} must hold labels from 0 to {num_labels - 1}; got {value!r}.")
    return number


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Ids padded with 0 to the longest input of the batch, and their mask; labels.

    Returns: `input_ids`, `attention_mask`: `[batch, tokens]`, for two inputs `[batch, 2, tokens]`; `labels` `[batch]`.
    """
    longest = max(len(ids) for row in rows for ids in row["input_ids"])
    padded = torch.tensor([[[*ids, *[0] * (longest - len(ids))] for ids in row["input_ids"]] for row in rows])
    if padded.shape[1] == 1:
        padded = padded[:, 0]
    return {
        "input_ids": padded,
        "attention_mask": (padded != 0).long(),
        "labels": torch.tensor([row["label"] for row in rows]),
    }
