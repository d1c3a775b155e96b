"""What a command prints: its result on stdout, for people or as JSON, and everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 160  # of tables that go to a file or a pipe


def note(text: str) -> None:
    """Tell something beside the result."""
    print(text, file=sys.stderr)


def print_json(result: Mapping[str, Any]) -> None:
    print(json.dumps(result, indent=2, default=str))


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")


def print_line(text: str) -> None:
    print(text)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False, markup=False).print(table)
