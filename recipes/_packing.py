"""Texts as rows of one length: joined, tokenized and cut, so that no row is padded."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from _common import FORMATS, RecipeError, find_column
from _data import Data, column_names
from _text import TEXT_NAMES

TEXT_FORMATS = {**FORMATS, ".txt": "text"}


def packed(data: Data, column: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Data:
    """Rows of `max_length` tokens: the texts one after the other, a line break after each that has none.

    A thousand texts at a time are joined and cut, with the special tokens of the model in every row; what is left at
    the end of them is dropped.

    Args:
        column: That of the texts, if it has none of the usual names.
    """
    if not tokenizer.is_fast:
        raise RecipeError(f"A fast tokenizer cuts texts into rows; {type(tokenizer).__name__} is none.")
    columns = column_names(data)
    column = find_column(columns, column, TEXT_NAMES, "text_column")

    def pack(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = rows[column]
        if any(not isinstance(text, str) for text in texts):
            raise RecipeError(f"Column {column!r} has values that are not text, or are missing.")
        joined = "".join(text if text.endswith("\n") else text + "\n" for text in texts)
        options = {"truncation": True, "max_length": max_length, "return_overflowing_tokens": True}
        found = tokenizer(joined, **options)["input_ids"]
        return {"input_ids": [ids for ids in found if len(ids) == max_length]}

    return data.map(pack, batched=True, remove_columns=columns)
