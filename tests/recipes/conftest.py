"""Every test of the recipes leaves the user's cache and the logging of this process alone."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from recipe_groups import Groups
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cache = tmp_path_factory.getbasetemp() / "datasets"  # not the user's
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="session")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    return Groups(tmp_path_factory.mktemp("groups"))
