"""Rows that a model takes: texts joined and cut, or one by one; images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .files import UNREADABLE, column_names, find_column

TEXT_NAMES = ("text", "sentence", "content", "document", "sentence1", "premise", "question1", "question")
IMAGE_NAMES = ("image", "img")
# Modes of Pillow with 8 bits a channel that become RGB or grey without surprise.
EIGHT_BIT_MODES = ("RGB", "L", "1", "P", "LA", "PA", "RGBA", "RGBX", "La", "RGBa")


# -- texts ------------------------------------------------------------------------------------------------------------
def choose_max_length(
    wanted: int | None,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    flag: str,
    advice: str = "Extend the positions of the checkpoint first.",
) -> int:
    """How many tokens a row has: what the user wants, checked against the positions of the model, or all of them.

    Args:
        flag: What the user gave it with, for errors.
        advice: What to do for longer rows.
    """
    limit, least = getattr(config, "max_position_embeddings", None), tokenizer.num_special_tokens_to_add() + 1
    if wanted is not None and wanted < least:
        raise InputError(f"--{flag} must be at least {least}, the special tokens and one of the text; got {wanted}.")
    if wanted is not None and limit is not None and wanted > limit:
        raise InputError(
            f"--{flag} must be at most {limit}, the number of positions the model has; got {wanted}. {advice}"
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


def whole_texts(data: Any, column: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int, flag: str) -> Any:
    """Rows of at most `max_length` tokens that hold whole texts, with `position_ids` that restart with each.

    Of a thousand texts at a time, the longest first, each goes into the fullest row that has room for it. A text of
    more tokens is cut into several.
    """
    if not tokenizer.is_fast:
        raise InputError(f"A fast tokenizer cuts texts into rows; {type(tokenizer).__name__} is none.")

    def pack(texts: list[str]) -> dict[str, list[Any]]:
        options = {"truncation": True, "max_length": max_length, "return_overflowing_tokens": True}
        texts = [text for text in texts if text.strip()]
        pieces = tokenizer(texts, **options)["input_ids"] if texts else []
        rows: list[list[list[int]]] = []
        room: list[int] = []
        for piece in sorted((piece for piece in pieces if piece), key=len, reverse=True):
            fitting = [n for n, left in enumerate(room) if left >= len(piece)]
            if not fitting:
                rows.append([])
                room.append(max_length)
            row = min(fitting, key=room.__getitem__, default=len(rows) - 1)
            rows[row].append(piece)
            room[row] -= len(piece)
        return {
            "input_ids": [[token for piece in row for token in piece] for row in rows],
            "position_ids": [[place for piece in row for place in range(len(piece))] for row in rows],
        }

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
