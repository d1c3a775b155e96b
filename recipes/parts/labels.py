"""Labels of a classification task, or numbers of a regression, and the model's outputs that stand for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedConfig

from hf_linattn.data.files import column_names, find_column

from .common import RecipeError
from .data import Data, is_stream

MAX_LABELS = 1000  # more is a column of something else
MISSING = (None, -1)  # -1: of a test set whose labels are kept secret


@dataclass
class Labels:
    """What the column of labels holds.

    Args:
        column: Its name.
        index: Label -> output of the model; None for numbers that one output predicts (regression).
        names: Output -> what it is called; of a regression none.
        new_head: Whether the checkpoint has another number of outputs.
    """

    column: str
    index: dict[Any, int] | None
    names: Sequence[str]
    new_head: bool = False

    @property
    def is_regression(self) -> bool:
        return self.index is None

    def name(self, output: Any) -> str:
        """What an output is called; of a regression the number."""
        return f"{output:.4g}" if self.is_regression else str(self.names[int(output)])

    def to_dict(self) -> dict[str, int] | None:
        """Label -> output, as JSON."""
        return None if self.index is None else {str(label): i for label, i in self.index.items()}

    def encode(self, values: Sequence[Any]) -> list[Any]:
        """The model's labels. Raises: RecipeError for a missing one, and for one that is not known."""
        for value in values:
            if self.index is None:
                if not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise RecipeError(f"Column {self.column!r} must hold numbers; got {value!r}.")
            elif value not in self.index:
                known = list(self.index)[:10]
                raise RecipeError(f"Column {self.column!r} must hold one of the labels {known}; got {value!r}.")
        return [float(v) for v in values] if self.index is None else [self.index[v] for v in values]


def find_label_column(splits: Mapping[str, Data], wanted: str | None, usual: Sequence[str]) -> str | None:
    """The column named, else the first usual one that exists; None for test data alone that have none."""
    names = column_names(next(iter(splits.values())))
    if wanted is None and list(splits) == ["test"] and not set(usual) & set(names):
        return None
    return find_column(names, wanted, usual, "label_column")


def read_labels(splits: Mapping[str, Data], column: str | None, config: PreTrainedConfig, trains: bool) -> Labels:
    """The labels of the data, on the outputs that the checkpoint has for them; without any those of the checkpoint.

    Args:
        config: Of the checkpoint; it is told what its outputs are from now on.
        trains: Whether the run may replace a head that does not fit.
    Raises: RecipeError for missing labels, for too few or too many different ones, and for those that do not fit the
        checkpoint of a run that does not train.
    """
    splits = {split: data for split, data in splits.items() if column in (data.column_names or [column])}
    if column is None or not splits:
        return _labels_of_checkpoint(config)
    feature, outputs = _feature(splits, column), config.num_labels
    if getattr(feature, "dtype", "").startswith(("float", "double")):
        if outputs != 1 and not trains:
            raise RecipeError(
                f"Column {column!r} holds numbers, which the {outputs} outputs of the checkpoint do not fit."
            )
        config.num_labels, config.problem_type = 1, "regression"
        return Labels(column, None, [], new_head=outputs != 1)
    config.problem_type = "single_label_classification"
    values = _find_labels(splits, column)
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else [str(value) for value in values]
    index = _checkpoint_index(values, names, config, named=isinstance(feature, datasets.ClassLabel))
    if index is None and not trains:
        raise RecipeError(f"The labels {names} do not fit those of the checkpoint: {list(config.label2id or {})}.")
    has_no_names = list(config.label2id or {}) == [f"LABEL_{i}" for i in range(outputs)]
    if index is None or (trains and has_no_names and len(values) == outputs):
        index = {value: i for i, value in enumerate(values)}
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    names = [config.id2label[i] for i in range(config.num_labels)]
    return Labels(column, index, names, new_head=config.num_labels != outputs)


def without_missing_labels(splits: Mapping[str, Data], column: str | None) -> dict[str, Data]:
    """The splits; a test split of which no label is known loses the column."""
    return {
        split: data.remove_columns([column])
        if split.startswith("test") and column in data.column_names and set(data[column]) <= set(MISSING)
        else data
        for split, data in splits.items()
    }


def _labels_of_checkpoint(config: PreTrainedConfig) -> Labels:
    if config.num_labels == 1:
        return Labels("", None, [])
    names = [config.id2label[i] for i in range(config.num_labels)]
    return Labels("", {name: i for i, name in enumerate(names)}, names)


def _feature(splits: Mapping[str, Data], column: str) -> Any:
    """What the data says about the column; None if it says nothing."""
    return next((data.features[column] for data in splits.values() if data.features), None)


def _find_labels(splits: Mapping[str, Data], column: str) -> list[Any]:
    """The labels in the order of their indices: that of a `ClassLabel` column, else sorted."""
    feature = _feature(splits, column)
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
                f"{wrong[0]!r}. See --label_column."
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


def _checkpoint_index(labels: Sequence[Any], names: Sequence[str], config: Any, named: bool) -> dict[Any, int] | None:
    """Which output of the checkpoint stands for each label: by name, else by number. None if they do not fit.

    Labels with names of their own, and another number of them, are other things than the checkpoint's.
    """
    known = config.label2id or {}
    if all(name in known for name in names):
        return {label: known[name] for label, name in zip(labels, names, strict=True)}
    if named and len(labels) != config.num_labels:
        return None
    if all(isinstance(label, int) and 0 <= label < config.num_labels for label in labels):
        return {label: label for label in labels}
    return None
