"""Attention through slots takes one road with short inputs on a CPU, and another with all others."""

from __future__ import annotations

import pytest

from hf_linattn.kernels.short_slots import operator


@pytest.fixture(params=["short", "long"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both, whatever the length: for tests of what attention functions compute."""
    name: str = request.param
    monkeypatch.setattr(operator, "pays", lambda *_: name == "short")
    return name
