"""Tiny checkpoints for the commands, and the same converted, calibrated and trained by them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from shell import shell
from tiny_checkpoints import build
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock checkpoints and data; `favor` (untrained), `sharp` (not calibrated) and `plain` (no maps) of GPT-2."""
    path = tmp_path_factory.mktemp("shell")
    build(path)
    small = ("--set", "window_size=8", "--set", "num_features=8")
    shell("convert", path / "gpt2", path / "favor", "--kind", "favor_plus", "--learned", *small)
    shell("convert", path / "gpt2", path / "sharp", "--kind", "favor_sharp", "--learned", *small)
    shell("convert", path / "gpt2", path / "plain", "--kind", "favor_plus", *small)
    return path


@pytest.fixture(autouse=True)
def _own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")  # not the user's
    verbosity, of_datasets = transformers_logging.get_verbosity(), datasets.logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    datasets.logging.set_verbosity(of_datasets)
