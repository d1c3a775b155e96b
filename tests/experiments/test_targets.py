"""The script that checks the library's own targets: its arithmetic, not its times."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from hf_linattn.bench.measure import Failure, Timing

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "targets.py"


@pytest.fixture(scope="module")
def targets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_targets", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_claims(targets: ModuleType) -> None:
    claims = targets.speed_claims()
    assert len({claim.name for claim in claims}) == len(claims) >= 18
    assert all(claim.work.batch == 1 and (claim.work.heads, claim.work.head_dim) == (4, 64) for claim in claims)
    favor = [c for c in claims if c.kind == "favor_plus" and c.against == targets.SOFTMAX]
    plain = {c.work: c.target for c in favor if c.options == targets.PLAIN}
    windows = [c for c in claims if c.options.window_size]
    assert windows
    assert all(claim.target == plain[claim.work] / 2 for claim in windows)


def test_memory_claims_leave_out_causal_eva(targets: ModuleType) -> None:
    found = [(kind, work.is_causal) for kind, work, _ in targets.memory_claims()]
    assert ("eva", False) in found
    assert ("eva", True) not in found
    assert {("lara", True), ("favor_sharp", True), ("favor_plus", True)} < set(found)


@pytest.mark.parametrize(("ours", "verdict"), [(0.1, "pass"), (0.125, "pass"), (0.126, "miss")])
def test_verdicts(targets: ModuleType, ours: float, verdict: str) -> None:
    claim = targets.speed_claims()[0]  # at least 8 times faster
    window = replace(claim, options=targets.WINDOW)
    found = {
        "sdpa": Timing((0.5, 1.0, 9.0)),
        "sdpa:math": Timing((0.5, 0.5, 0.5)),
        claim.ours.name: Timing((ours,) * 3),
        window.ours.name: Timing((2 * ours,) * 3),
    }
    row = targets.judge(claim, found)
    assert row["verdict"] == verdict
    assert row["ratio"] == pytest.approx(1 / ours)
    assert row["ratio_to_best_softmax"] == pytest.approx(0.5 / ours)
    assert row["ratio_of_minima"] == pytest.approx(0.5 / ours)
    assert verdict in targets.show(row)
    assert targets.judge(window, found)["window_cost"] == pytest.approx(2.0)
    json.dumps(row)


def test_a_failure_is_not_a_pass(targets: ModuleType) -> None:
    claim = targets.speed_claims()[0]
    row = targets.judge(claim, {"sdpa": Timing((1.0,)), claim.ours.name: Failure("out of memory")})
    assert row["verdict"] == "not measured"
    assert "out of memory" in targets.show(row)


def test_memory_slopes(targets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"linear": lambda n: n, "quadratic": lambda n: n * n, "missing": lambda n: None if n == 65536 else n}
    wanted = {"linear": "pass", "quadratic": "miss", "missing": "not measured"}
    for name, peak in peaks.items():
        monkeypatch.setattr(
            targets,
            "measure_peaks",
            lambda kind, options, works, peak=peak: [(work, peak(work.tokens), "") for work in works],
        )
        rows = list(targets.memory_rows(targets.LENGTHS, "lara causal"))
        assert [row["verdict"] for row in rows] == [wanted[name]]
        assert "lara" in targets.show(rows[0])
        targets.summary(rows)
