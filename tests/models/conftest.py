"""Saved models that the tests of checkpoints begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import BERT

import hf_linattn


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    BERT.build().save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    hf_linattn.convert(BERT.build(), BERT.settings("favor_plus")).save_pretrained(tmp_path / "converted")
    return tmp_path / "converted"
