"""The table in docs/common_tests.md names tests that exist, and every test of this folder."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "docs" / "common_tests.md"


def names_in(folder: Path) -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in folder.rglob("test_*.py"))
    return {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


def test_names_in_the_table() -> None:
    named = set(re.findall(r"`(test_\w+)`", TABLE.read_text(encoding="utf-8")))
    own = {name for name in globals() if name.startswith("test_")}
    assert not named - names_in(HERE.parent), "named in the table, but not there"
    assert not names_in(HERE) - named - own, "not named in the table"
