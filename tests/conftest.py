"""Shared fixtures: no network, fixed seeds, and warnings that are given once per process given once per test."""

from __future__ import annotations

import gc
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import compatibility
import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton kernels run in Triton's interpreter. Triton looks when it is imported, as most models do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hf_linattn.integrations.checks as checks

# How long an example takes says nothing on a shared machine. Tests that name a number of examples scale it as well
# (`helpers.examples`). All of them: pytest --hypothesis-profile=thorough.
settings.register_profile("brief", deadline=None, max_examples=35)
settings.register_profile("thorough", deadline=None, max_examples=100)
settings.load_profile("brief")


gc.disable()  # while modules are imported and tests collected, of which nothing is garbage


def pytest_addoption(parser: pytest.Parser) -> None:
    compatibility.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    compatibility.configure(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    compatibility.mark_topics(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """What is imported and collected stays to the end: no collection need look at all of it again."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logging.getLogger("hf_linattn").setLevel(logging.NOTSET)  # programs set it when a test runs them in this process
    monkeypatch.setattr(checks, "_dropout_warned", False)
    monkeypatch.setattr(checks, "_last_checked", None)
