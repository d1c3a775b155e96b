"""Words with tags in the text format of the CoNLL shared tasks: a word a line, an empty line between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import fsspec

from ..errors import InputError

WORDS, TAGS = "tokens", "tags"


def load_conll(paths: Sequence[str], flag: str, *, streaming: bool = False) -> Any:
    """The sentences of files as lists of words (`tokens`) and, where lines have more than one column, `tags`.

    The first column of a line is the word, the last one its tag; they are separated by tabs or spaces. Lines that
    begin with -DOCSTART- are left out.

    Args:
        flag: What the user gave them with, for errors.
        streaming: Read sentences when they are needed, and store none.
    Raises: `InputError` that names file and line for lines of different numbers of columns, and for empty words.
    """
    first = next(_sentences(paths, flag), None)
    if first is None:
        raise InputError(f"{flag} {', '.join(paths)!r} has no rows.")
    features = datasets.Features({name: datasets.List(datasets.Value("string")) for name in first})
    if streaming:
        given = {"paths": list(paths), "flag": flag}
        return datasets.IterableDataset.from_generator(_sentences, gen_kwargs=given, features=features)
    return datasets.Dataset.from_list(list(_sentences(paths, flag)), features)


def _sentences(paths: Sequence[str], flag: str) -> Iterator[dict[str, list[str]]]:
    width: int | None = None
    for file in fsspec.open_files(list(paths), "rt", encoding="utf-8-sig"):
        rows: list[list[str]] = []
        try:
            with file as opened:
                for number, line in enumerate(opened, 1):
                    row = _columns(line)
                    if row and row[0] == "-DOCSTART-":
                        row = []
                    if not row and rows:
                        yield _as_lists(rows)
                        rows = []
                    if not row:
                        continue
                    width = width or len(row)
                    where = f"{flag} {file.path!r}, line {number}"
                    if len(row) != width:
                        raise InputError(
                            f"{where}: every line must have {width} columns, as the first one; got {row}."
                        )
                    if not row[0]:
                        raise InputError(f"{where}: the first column must be a word; got {line.rstrip()!r}.")
                    rows.append(row)
        except UnicodeDecodeError as error:
            raise InputError(f"{flag} {file.path!r} is not UTF-8 text: {error}") from None
        if rows:
            yield _as_lists(rows)


def _columns(line: str) -> list[str]:
    """The columns of a line, of an empty one none. Other white space than tabs and spaces may be part of a word."""
    line = line.strip("\r\n")
    if not line.strip():
        return []
    if "\t" in line:
        return [column.strip(" ") for column in line.split("\t")]
    return re.split(" +", line.strip(" "))


def _as_lists(rows: list[list[str]]) -> dict[str, list[str]]:
    words = {WORDS: [row[0] for row in rows]}
    return words if len(rows[0]) == 1 else {**words, TAGS: [row[-1] for row in rows]}
