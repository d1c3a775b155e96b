"""Links of the README and the docs lead somewhere, and the files they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:[\w.]+/)+(?:[\w.]+\.(?:py|md|json))?)`")  # `ops/layout.py`, `ops/recurrent/`
# What only the reader's machine has.
ELSEWHERE = ("runs/", "sst2/", "documents/", "http", "me/")


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files(page: Path) -> None:
    names = {name for name in FILE.findall(page.read_text(encoding="utf-8")) if not name.startswith(ELSEWHERE)}
    folders = ROOT, ROOT / "hf_linattn", page.parent
    assert not {name for name in names if not any((folder / name).exists() for folder in folders)}
