"""EVA has a road for short inputs (`ops/eva/short.py`) and one for all: tests of EVA take both."""

from __future__ import annotations

import pytest

from hf_linattn.ops.eva import short

# The long road is what short inputs took before there was another: with `slow` all tests take it, and by default
# those inputs that the short one does not know (padding, images, causal layers).
ROADS = [pytest.param(short.LONGEST, id=""), pytest.param(0, id="long", marks=pytest.mark.slow)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.module.__name__
    if name.startswith(("test_eva", "test_golden", "test_gradients")) and name != "test_eva_short":
        metafunc.fixturenames.append("longest")
        metafunc.parametrize("longest", ROADS, indirect=True)


@pytest.fixture
def longest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Most tokens of an input that takes the short road."""
    monkeypatch.setattr(short, "LONGEST", request.param)
    return request.param
