"""Hostile numbers: a part of what `scripts/hostile_numbers.py` sweeps over, with the same bound."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("road")

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def sweep() -> Iterator[Any]:
    """The parts of the script."""
    sys.path.insert(0, str(SCRIPTS))
    from hostile_parts import exceptions, inputs, measure, page, settings

    yield type("Sweep", (), {m.__name__.split(".")[-1]: m for m in (exceptions, inputs, measure, page, settings)})
    sys.path.remove(str(SCRIPTS))


FORMS = [
    "FAVOR+, no window",
    "FAVOR+, window 8",
    "FAVOR+ causal, no window",
    "FAVOR+ causal, window 8, padding",
    "FAVOR# saderf, no window",
    "FAVOR# saderf, calibrated, causal, no window",
    "LARA balance, no window",
    "LARA balance, window 8",
    "LARA calibrated, causal, no window",
    "LARA calibrated, causal, overlapping window 8",
    "EVA 12 chunks",
    "EVA 12 chunks, key",
    "EVA 12 chunks, spread",
    "EVA causal, key",
]


@pytest.mark.parametrize("form", FORMS)
def test_errors_stay_in_bounds(form: str, sweep: Any) -> None:
    """At x1e3 as good as softmax or the plain formula, or listed; at x1e5 finite. Outputs and gradients."""
    setting = next(s for s in sweep.settings.SETTINGS if s.name == form)
    cases = sweep.measure.cases([setting], ["float32"], (1e3, 1e5))
    assert sweep.page.unexplained(sweep.page.summarised(cases)) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["FAVOR+ causal, no window", "LARA balance, window 8", "EVA 12 chunks, key"])
def test_hostile_numbers_in_half_precision(form: str, dtype: str, sweep: Any) -> None:
    setting = next(s for s in sweep.settings.SETTINGS if s.name == form)
    cases = sweep.measure.cases([setting], [dtype], (1e2,))
    assert sweep.page.unexplained(sweep.page.summarised(cases)) == []


def test_plain_formulas_are_the_functions(sweep: Any) -> None:
    """In float64 on ordinary numbers: what is measured against is the same thing."""
    inputs = [z.double() for z in sweep.inputs.ordinary(sweep.settings.SHAPE)]
    for setting in sweep.settings.SETTINGS:
        torch.testing.assert_close(
            setting.call(*inputs),
            setting.formula(*inputs),
            rtol=0,
            atol=1e-9,
            msg=lambda m, s=setting: f"{s.name}: {m}",
        )


@pytest.mark.parametrize("kind", ["favor", "lara"])
def test_one_huge_query_keeps_its_gradient(kind: str) -> None:
    """Its own factor, minus half of its squared length, enters no weight. Also with dropout, whose forms are dense."""
    from hf_linattn.functional import CalibratedProposals, draw_projection, favor_attention, lara_attention

    directions = draw_projection(1, 32, 16, seed=0)
    query, key, value = torch.randn(3, 1, 1, 48, 16, generator=torch.Generator().manual_seed(0))
    query[:, :, 5] *= 1e4

    def gradients(dtype: torch.dtype, dropout: float) -> list[Tensor]:
        leaves = [z.to(dtype).requires_grad_() for z in (query, key, value)]
        options: dict[str, Any] = {"is_causal": True, "slot_dropout": dropout}
        if kind == "favor":
            out = favor_attention(*leaves, directions, **options)
        else:
            out = lara_attention(*leaves, proposals=CalibratedProposals(directions[:, :8], directions), **options)
        return list(torch.autograd.grad(out.sum(), leaves))

    for dropout in (0.0, 1e-12):
        for low, high in zip(gradients(torch.float32, dropout), gradients(torch.float64, dropout), strict=True):
            assert (low - high).abs().max() < 1e-2


@pytest.mark.parametrize("proposals", ["key", "sum"])
def test_a_constant_added_to_all_keys_costs_eva_nothing(proposals: str) -> None:
    """Nothing more than softmax: summaries are made of distances within a chunk."""
    from hf_linattn.functional import eva_attention, softmax_attention

    query, key, value = torch.randn(3, 1, 2, 48, 16, generator=torch.Generator().manual_seed(0))
    key = key + 1000 * torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(1))

    def off(function: Any, **options: Any) -> float:
        wide = function(query.double(), key.double(), value.double(), **options)
        return float((function(query, key, value, **options) - wide).abs().max())

    exact = off(softmax_attention)
    assert off(eva_attention, window_size=8, num_chunks=12, proposals=proposals) < 4 * exact
