"""Texts and labels of a classification task: finding the columns, tokenizing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from _common import RecipeError, find_column
from _data import Data, column_names, is_stream

TEXT_NAMES = ("text", "sentence", "content", "document", "sentence1", "premise", "question1", "question")
PAIR_NAMES = {"sentence1": "sentence2", "premise": "hypothesis", "question1": "question2", "question": "sentence"}
LABEL_NAMES = ("label", "labels", "target", "class")
MAX_LABELS = 1000  # more is a column of something else


@dataclass
class Columns:
    text: str
    pair: str | None
    label: str


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
    """Names of the text and label columns, the same in every split."""
    names = column_names(next(iter(splits.values())))
    text = find_column(names, args.text_column, TEXT_NAMES, "text_column")
    pair = args.text_pair_column
    if pair is not None:
        find_column(names, pair, (), "text_pair_column")
    elif args.text_column is None and PAIR_NAMES.get(text) in names:
        pair = PAIR_NAMES[text]
    columns = Columns(text, pair, find_column(names, args.label_column, LABEL_NAMES, "label_column"))
    for split, data in splits.items():
        for name in filter(None, (columns.text, columns.pair, columns.label)):
            if name not in column_names(data):
                raise RecipeError(f"The {split} data has no column {name!r}; its columns: {column_names(data)}.")
    return columns


def find_labels(splits: Mapping[str, Data], column: str) -> list[Any]:
    """The labels in the order of their indices: that of a `ClassLabel` column, else sorted."""
    feature = (next(iter(splits.values())).features or {}).get(column)
    if isinstance(feature, datasets.ClassLabel):
        return list(range(feature.num_classes))
    stored = {split: data for split, data in splits.items() if not is_stream(data)}
    if not stored:
        raise RecipeError(
            f"With --streaming nobody knows which labels column {column!r} has. Give --do_eval with validation data."
        )
    values: set[Any] = set()
    for split, data in stored.items():
        found = set(data.unique(column))
        wrong = [v for v in found if isinstance(v, bool) or not isinstance(v, (int, str))]
        if wrong:
            raise RecipeError(
                f"Column {column!r} of the {split} data must hold class labels (whole numbers or text); got "
                f"{wrong[0]!r}. Regression and missing labels are not supported. See --label_column."
            )
        values |= found
    if len({type(v) for v in values}) > 1:
        raise RecipeError(
            f"Column {column!r} holds text in one split and numbers in another: {sorted(map(str, values))}."
        )
    if len(values) < 2:
        raise RecipeError(f"Column {column!r} holds one label only: {values}. Classification needs at least two.")
    if len(values) > MAX_LABELS:
        raise RecipeError(f"Column {column!r} holds {len(values)} different labels. Is it the right --label_column?")
    return sorted(values)


def label_names(splits: Mapping[str, Data], column: str, labels: Sequence[Any]) -> list[str]:
    """The labels as text: the names of a `ClassLabel` column, else the values."""
    feature = (next(iter(splits.values())).features or {}).get(column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else [str(label) for label in labels]


def checkpoint_index(labels: Sequence[Any], names: Sequence[str], config: Any) -> dict[Any, int] | None:
    """Which output of the checkpoint stands for each label: by name, else by number. None if they do not fit."""
    known = config.label2id or {}
    if all(name in known for name in names):
        return {label: known[name] for label, name in zip(labels, names, strict=True)}
    if all(isinstance(label, int) and 0 <= label < config.num_labels for label in labels):
        return {label: label for label in labels}
    return None


def position_limit(config: Any) -> int | None:
    """How many positions the model has, where the config says so."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def tokenizer_function(
    tokenizer: PreTrainedTokenizerBase, columns: Columns, index: Mapping[Any, int], max_length: int
) -> Callable[[dict[str, list]], dict[str, list]]:
    """What turns a batch of rows into model inputs; `index` maps labels to the model's. Padding comes per batch."""

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        texts = [rows[columns.text]] + ([rows[columns.pair]] if columns.pair else [])
        if any(not isinstance(text, str) for texts_ in texts for text in texts_):
            raise RecipeError(f"Column {columns.text!r} (or its pair) has values that are not text, or are missing.")
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        encoded["label"] = [_index_of(label, index, columns.label) for label in rows[columns.label]]
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        return encoded

    return tokenize


def _index_of(label: Any, index: Mapping[Any, int], column: str) -> int:
    if label not in index:
        known = list(index)
        raise RecipeError(f"Column {column!r} must hold one of the labels {known[:10]}; got {label!r}.")
    return index[label]


def choose_max_length(wanted: int | None, tokenizer: PreTrainedTokenizerBase, config: Any) -> int:
    """`--max_length`, checked against the positions of the model."""
    limit = position_limit(config)
    if wanted is not None and limit is not None and wanted > limit:
        raise RecipeError(
            f"--max_length must be at most {limit}, the number of positions the model has; got {wanted}. Longer "
            f"inputs need --extend_positions {wanted}."
        )
    return wanted or min(limit or 512, tokenizer.model_max_length)
