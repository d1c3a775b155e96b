"""What there is to read: files, the Hub, or Pathfinder's published folder; validation rows out of training rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from parts.common import RecipeError
from parts.data import Data, DataArguments, is_stream

from .tasks import ColumnArguments

SHARES = (0.8, 0.9)  # of Pathfinder's rows, as published: training, then validation, then test


@dataclass
class ArenaDataArguments(ColumnArguments, DataArguments):
    """Which data, and how it is read."""

    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "pathfinder: a published folder, such as pathfinder32/curv_contour_length_14, with metadata and "
            "images; of its rows, shuffled with --split_seed, 80 %% train, 10 %% validate, 10 %% test"
        },
    )
    train_val_split: float | None = field(
        default=None, metadata={"help": "Share of the training rows, the last ones, to validate on"}
    )
    split_seed: int = field(default=0, metadata={"help": "Of the order of the rows in --data_dir"})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens after which a text is cut (default: those of Long Range Arena)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_val_split is not None and not 0 < self.train_val_split < 1:
            raise RecipeError(f"--train_val_split must be above 0 and below 1; got {self.train_val_split}.")
        if self.max_length is not None and self.max_length < 1:
            raise RecipeError(f"--max_length must be at least 1; got {self.max_length}.")
        if self.data_dir and (self.dataset_name or self.train_file or self.validation_file or self.test_file):
            raise RecipeError("Give --data_dir, or --dataset_name, or files; not several of them.")

    def complete(self, splits: Mapping[str, Data]) -> Mapping[str, Data]:
        """The splits there are, with rows to validate on out of those for training, if that is asked for."""
        if self.train_val_split is None:
            return splits
        if "validation" in splits or "train" not in splits or is_stream(splits["train"]):
            raise RecipeError("--train_val_split takes stored training data, and no validation data beside it.")
        rows = splits["train"]
        first = round(len(rows) * (1 - self.train_val_split))
        return {**splits, "train": rows.select(range(first)), "validation": rows.select(range(first, len(rows)))}


def published_pathfinder(folder: str, seed: int) -> dict[str, datasets.Dataset]:
    """The three splits of a folder as it is published with Long Range Arena.

    `metadata/*.npy` are text, a line an image: folder, file, number, label and more. Empty images are left out, as in
    the published code.
    """
    root = Path(folder)
    lists = sorted((root / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    if not lists:
        raise RecipeError(f"--data_dir {folder!r} must hold metadata/*.npy, as the published Pathfinder does.")
    images, labels = [], []
    for path in lists:
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise RecipeError(
                    f"{path.name} of --data_dir must hold lines 'folder file number label'; got {line!r}."
                )
            image = root / fields[0] / fields[1]
            if not image.is_file():
                raise RecipeError(f"{path.name} of --data_dir names {fields[0]}/{fields[1]}, which is not there.")
            if image.stat().st_size:
                images.append(str(image))
                labels.append(int(fields[3]))
    order = np.random.default_rng(seed).permutation(len(images))
    rows = datasets.Dataset.from_dict(
        {"image": [images[i] for i in order], "label": [labels[i] for i in order]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    first, second = (int(len(rows) * share) for share in SHARES)
    parts = {"train": range(first), "validation": range(first, second), "test": range(second, len(rows))}
    return {split: rows.select(part) for split, part in parts.items()}
