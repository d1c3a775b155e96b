"""Texts of a classification task: finding the columns, tokenizing, and how long inputs may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_linattn.data import rows
from hf_linattn.data.files import column_names, find_column
from hf_linattn.data.rows import TEXT_NAMES

from .common import RecipeError
from .data import Data
from .labels import Labels, find_label_column

PAIR_NAMES = {"sentence1": "sentence2", "premise": "hypothesis", "question1": "question2", "question": "sentence"}
LABEL_NAMES = ("label", "labels", "target", "class")


@dataclass
class Columns:
    text: str
    pair: str | None
    label: str | None


@dataclass
class LengthArguments:
    """How long inputs are."""

    max_length: int | None = field(
        default=None, metadata={"help": "Tokens after which an input is cut (default: the positions of the model)"}
    )
    extend_positions: int | None = field(
        default=None, metadata={"help": "Give the model so many positions, for longer inputs than it was trained for"}
    )
    extend_method: str = field(
        default="tile", metadata={"help": "'tile' repeats the table of positions, 'interpolate' stretches it"}
    )


@dataclass
class ColumnArguments(LengthArguments):
    """Where texts and labels are."""

    text_column: str | None = field(default=None, metadata={"help": f"Default: the first of {', '.join(TEXT_NAMES)}"})
    text_pair_column: str | None = field(default=None, metadata={"help": "For pairs of texts"})
    label_column: str | None = field(
        default=None, metadata={"help": f"Default: the first of {', '.join(LABEL_NAMES)}"}
    )


def find_columns(splits: Mapping[str, Data], args: ColumnArguments) -> Columns:
    """Names of the text and label columns, the same in every split. Test data may have no labels."""
    names = column_names(next(iter(splits.values())))
    text = find_column(names, args.text_column, TEXT_NAMES, "text_column")
    pair = args.text_pair_column
    if pair is not None:
        find_column(names, pair, (), "text_pair_column")
    elif args.text_column is None and PAIR_NAMES.get(text) in names:
        pair = PAIR_NAMES[text]
    columns = Columns(text, pair, find_label_column(splits, args.label_column, LABEL_NAMES))
    for split, data in splits.items():
        for name in filter(None, (columns.text, columns.pair, columns.label)):
            if name not in column_names(data) and (name, split) != (columns.label, "test"):
                raise RecipeError(f"The {split} data has no column {name!r}; its columns: {column_names(data)}.")
    return columns


def tokenizer_function(
    tokenizer: PreTrainedTokenizerBase, columns: Columns, labels: Labels, max_length: int
) -> Callable[[dict[str, list]], dict[str, list]]:
    """What turns a batch of rows into model inputs. Padding comes per batch."""

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        texts = [rows[columns.text]] + ([rows[columns.pair]] if columns.pair else [])
        if any(not isinstance(text, str) for texts_ in texts for text in texts_):
            raise RecipeError(f"Column {columns.text!r} (or its pair) has values that are not text, or are missing.")
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        if columns.label in rows:  # a test set may have none
            encoded["label"] = labels.encode(rows[columns.label])
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        return encoded

    return tokenize


def choose_max_length(wanted: int | None, tokenizer: PreTrainedTokenizerBase, config: Any) -> int:
    """`--max_length`, checked against the positions of the model."""
    advice = f"Longer inputs need --extend_positions {wanted}."
    return rows.choose_max_length(wanted, tokenizer, config, "max_length", advice)
