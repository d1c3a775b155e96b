"""Files of texts, tables and images, as data sets or streams of `datasets`; their columns."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from ..errors import InputError
from .conll import load_conll

# Suffix of a file -> the builder of `datasets` that reads it.
IMAGE_FORMATS = {".parquet": "parquet"}
TEXT_FORMATS = {**IMAGE_FORMATS, ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
CONLL = "conll"  # not of `datasets`: our own
TAGGED_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".conll": CONLL, ".txt": CONLL}
BUILDER_OPTIONS: dict[str, dict[str, Any]] = {".tsv": {"sep": "\t"}, ".txt": {"keep_linebreaks": True}}
# What reading raises for a file, or a column, of something else.
UNREADABLE = (pa.ArrowException, ValueError, TypeError, OSError)


def be_quiet() -> None:
    """Leave it to the callers to tell what cannot be read, once."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


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
    if formats[suffix] == CONLL:
        return load_conll(paths, flag, streaming=streaming)
    options = {"split": "train", "streaming": streaming, **builder_options.get(suffix, {})}
    return _loaded(formats[suffix], flag, ", ".join(paths), data_files=list(paths), **options)


def load_images(folder: str, flag: str, labels: Sequence[str] | None = None, *, streaming: bool = False) -> Any:
    """The images in a folder, and in folders in it.

    Args:
        flag: What the user gave it with, for errors.
        labels: Names of the folders in it, which become a column `label`.
        streaming: Read rows when they are needed, and store none.
    """
    check_folder(folder, flag)
    options: dict[str, Any] = {"data_files": f"{folder}/**", "split": "train", "streaming": streaming}
    if labels is None:
        return _loaded("imagefolder", flag, folder, drop_labels=True, **options)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(labels))})
    return _loaded("imagefolder", flag, folder, drop_labels=False, features=features, **options)


def check_folder(folder: str, flag: str) -> None:
    """Raise `InputError` for a folder of images that is not there."""
    if not Path(folder).is_dir():
        raise InputError(f"{flag} must be a folder of images; {folder!r} is none.")


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
