"""Attention takes one road with short inputs on a CPU, and another with all others.

A module whose tests are to take both asks for them with `pytest.mark.usefixtures("road")`. Those of EVA take
both anyway: the long road with `slow`, and by default with inputs that the short one does not know (padding, images,
causal layers).
"""

from __future__ import annotations

import pytest

from hf_linattn.kernels.backends import current_backend
from hf_linattn.ops import short_attention
from hf_linattn.ops.eva import short


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.module.__name__
    is_eva = name.startswith("test_eva") and name != "test_eva_short"
    if not is_eva and "road" not in metafunc.fixturenames:
        return
    if is_eva:
        metafunc.fixturenames.append("road")
    long = pytest.param("long", marks=pytest.mark.slow) if is_eva else "long"
    metafunc.parametrize("road", ["short", long], indirect=True)


@pytest.fixture
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Slots take it whatever the length; with "short" EVA takes the one that it takes anyway."""
    name: str = request.param
    monkeypatch.setattr(short_attention, "suits_short", lambda *_: name == "short" and current_backend() != "triton")
    if name == "long":
        monkeypatch.setattr(short, "LONGEST", 0)
    return name
