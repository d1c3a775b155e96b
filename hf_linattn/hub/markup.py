"""Text of others (names from a config, a file, a card) as Markdown that shows it and does nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from urllib.parse import quote

# Line ends, control characters, and characters that turn the direction of what follows.
_INVISIBLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")
_MARKUP = re.compile(r"[\\`*\[\]|#~$!]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def text(value: object) -> str:
    """On one line, with every character that means something in Markdown or HTML escaped."""
    return _MARKUP.sub(lambda found: "\\" + found[0], _flat(value)).translate(_ENTITIES)


def code(value: object) -> str:
    """A code span, which holds anything, in a table too."""
    content = _flat(value).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", content)), default=0))
    space = " " if not content or "`" in (content[0], content[-1]) else ""
    return f"{fence}{space}{content}{space}{fence}"


def string(value: object) -> str:
    """A string of Python, on one line, within a block of code."""
    return json.dumps(_flat(value), ensure_ascii=False)


def links(names: Iterable[str], address: str) -> str:
    """Names with links to their pages below `address`, separated by commas."""
    return ", ".join(f"[{text(name)}]({address}/{quote(name)})" for name in names)


def _flat(value: object) -> str:
    return _INVISIBLE.sub(" ", str(value)).strip()
