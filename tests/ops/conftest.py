"""Attention takes one road with short inputs on a CPU, and another with all others.

A module whose tests are to take both asks for them with `pytest.mark.usefixtures("road")`. Those of EVA take
both anyway: the long road with `slow`, and by default with inputs that the short one does not know (padding, images,
causal layers). Where the parameters of a test say that there is no short road, both would do the same: one is `slow`.
"""

from __future__ import annotations

from typing import Any

import pytest
from variants import Variant

from hf_linattn.kernels.backends import current_backend
from hf_linattn.ops import short_attention
from hf_linattn.ops.eva import short

# Variants whose names begin so are called with options that the short road does not know.
LONG = ("favor_", "lara-optimal", "lara-calibrated")


def has_one_road(parameters: dict[str, Any]) -> bool:
    """Whether the parameters of a test say that it takes the long road.

    Causal attention does, and so does attention without a window, with one over all tokens, or with overlapping ones.
    """
    variant, least = parameters.get("attend"), 0
    if isinstance(variant, Variant):
        if variant.is_causal or variant.name.startswith(LONG):
            return True
        least = variant.smallest_window
    form = parameters.get("form", "")
    if any(word in form for word in ("causal", "no window", "spread")):
        return True
    options = parameters.get("options")
    given = {**parameters, **(options if isinstance(options, dict) else {})}
    window = max(given.get("window_size", given.get("window", 1)), least)
    return not 0 < window < 64 or any(given.get(name) for name in ("is_causal", "overlap", "overlap_window"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if parameters.get("road") == "long" and has_one_road(parameters):
            item.add_marker(pytest.mark.slow)


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
