"""The script that checks the library's own targets: its arithmetic, not its times."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from hf_linattn.bench.results import Row

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "targets.py"


@pytest.fixture(scope="module")
def targets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_targets", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_claims_of_the_targets(targets: ModuleType) -> None:
    claims = targets.speed_claims()
    assert len({claim.name for claim in claims}) == len(claims) >= 18
    assert all(claim.work.batch == 1 and (claim.work.heads, claim.work.head_dim) == (4, 64) for claim in claims)
    favor = {claim.contender.name: {} for claim in claims}
    for claim in claims:
        if claim.against == targets.SOFTMAX:
            favor[claim.contender.name][claim.work] = claim.target
    windows, plain = favor["favor_plus, window 64"], favor["favor_plus"]
    assert windows
    assert all(target == plain[work] / 2 for work, target in windows.items())


@pytest.mark.parametrize(("ours", "verdict"), [(0.1, "pass"), (0.125, "pass"), (0.126, "miss")])
def test_verdicts_of_the_targets(targets: ModuleType, ours: float, verdict: str) -> None:
    claim = targets.speed_claims()[0]  # at least 8 times faster
    rows = {
        "sdpa": Row("attention", "sdpa", "softmax", claim.work, median=1.0),
        claim.contender.name: Row(
            "attention", claim.contender.name, "linear", claim.work, median=ours, ratio=0.5 / ours
        ),
    }
    row = targets.judge(claim, rows)
    assert row["verdict"] == verdict
    assert row["ratio"] == pytest.approx(1 / ours)
    assert row["ratio_to_best_softmax"] == pytest.approx(0.5 / ours)
    assert verdict in targets.line(row)
    json.dumps(row)
    rows[claim.contender.name] = replace(rows[claim.contender.name], median=None, reason="out of memory")
    row = targets.judge(claim, rows)
    assert row["verdict"] == "not measured"
    assert "out of memory" in targets.line(row)


def test_memory_slopes(targets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"linear": lambda n: n, "quadratic": lambda n: n * n, "missing": lambda n: None if n == 65536 else n}
    wanted = {"linear": "pass", "quadratic": "miss", "missing": "not measured"}
    for name, peak in peaks.items():
        measure = lambda contender, works, peak=peak: [(work, peak(work.tokens), "") for work in works]  # noqa: E731
        monkeypatch.setattr(targets, "measure_peaks", measure)
        rows = list(targets.memory_rows(targets.LENGTHS, "causal"))
        assert {row["name"].split()[1] for row in rows} == {"favor_plus", "favor_sharp", "lara"}  # causal EVA need not
        assert {row["verdict"] for row in rows} == {wanted[name]}
        assert wanted[name] in targets.line(rows[0])
