"""The targets of short inputs: what is compared with what, what counts as kept, and what a file keeps."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_linattn.bench.kinds import KindOptions
from hf_linattn.bench.workload import Workload
from hf_linattn.modules.registry import list_kinds

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return importlib.import_module("short_inputs")


@pytest.fixture
def cases(script: Any) -> Any:
    return importlib.import_module("short_cases")


def of_case(script: Any, cases: Any, times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Lines by name of a case whose entries have taken so many seconds."""

    def race(rows: list[Any], *_: Any) -> list[Any]:
        for row, _make in rows:
            row.median = times.get(row.name)
            row.reason = "" if row.median else "it failed"
        return [row for row, _make in rows]

    monkeypatch.setattr(script, "race", race)
    run = cases.Run(tuple(list_kinds()))
    return {line["what"]: line for line in script.lines_of(next(iter(cases.attention(run))), run)}


def test_bounds_are_compared_with_their_own_reference(
    script: Any, cases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"sdpa": 1.0, "favor_plus": 6.0, "eva": 6.1, "favor_sharp": 8.9}
    lines = of_case(script, cases, times, monkeypatch)
    assert {name: line["held"] for name, line in lines.items()} == {
        "favor_plus": True,
        "eva": False,
        "favor_sharp": True,
        "lara": None,
    }
    assert lines["favor_sharp"]["over"] == "favor_plus"
    assert lines["favor_sharp"]["ratio"] == pytest.approx(8.9 / 6, abs=1e-3)
    assert lines["lara"]["reason"] == "it failed"
    assert script.verdict(lines["eva"]) == "MISSED"


def test_all_targets_are_there(cases: Any) -> None:
    """Of every part: both modes, all lengths, all kinds, and what each is compared with."""
    run = cases.Run(tuple(list_kinds()))
    counts = {part: len([*made(run)]) for part, made in cases.PARTS.items()}
    assert counts == {"attention": 10, "learned": 8, "exact": 10, "models": 12, "causal": 1, "performer": 44}
    titles = {case.title for part in cases.PARTS for case in cases.PARTS[part](run)}
    assert {
        "16 learned slots, 128 tokens, forward+backward",
        "minilm, 1024 tokens, batch 8, forward",
        "vit, 197 tokens, batch 8, forward+backward",
        "causal, 256 slots, 8192 tokens, forward+backward",
        "256 features, bfloat16, 65536 tokens, forward",
    } < titles
    few = cases.Run(("eva",), (128,))
    assert [case.title for case in cases.models(few)] == [f"minilm, 128 tokens, batch 8, {m}" for m in cases.MODES]


def test_defaults_are_timed_where_they_have_other_slots(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cases.Run(("favor_plus", "lara"), (16,), layers=1)
    monkeypatch.setattr(cases, "MINILM", {16: 1.0})
    monkeypatch.setattr(cases, "MINILM_LEARNED", {16: 1.0})
    monkeypatch.setattr(cases, "slots_of", lambda config: 64 if config.kind == "lara" else 256)
    names = [entry.name for entry in next(iter(cases.models(run))).entries()]
    assert "favor_plus, default" in names
    assert "lara, default" not in names
    assert {"lara, 64 slots", "lara, learned", "lara, exact below", "sdpa"} < set(names)


def test_a_run_writes_and_resumes(script: Any, cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny cases through the command; what a later run does not measure stays."""

    def tiny(run: Any) -> Any:
        for tokens in run.of([8, 16]):
            works = [cases.softmax(), *((name, cases.kind(name, KindOptions(8, 8, 8)), 1e9) for name in run.kinds)]
            yield cases.call_case("attention", "tiny", Workload(tokens, heads=1, head_dim=8), lambda made=works: made)

    monkeypatch.setitem(script.PARTS, "attention", tiny)
    monkeypatch.setattr(script.shared, "quiet", lambda: None)
    app = script.typer.Typer()
    app.command()(script.main)
    path = tmp_path / "out.json"
    base = ["--parts", "attention", "--seconds", "0.001", "--out", str(path)]

    def lines(*arguments: str) -> dict[tuple[str, str], float]:
        result = CliRunner().invoke(app, [*base, *arguments])
        assert result.exit_code == 0, result.output
        found = json.loads(path.read_text(encoding="utf-8"))["lines"]
        assert all(line["held"] for line in found)
        return {(line["case"], line["what"]): line["ratio"] for line in found}

    first = lines("--kinds", "favor_plus", "--lengths", "8")
    assert list(first) == [("tiny, 8 tokens, forward", "favor_plus")]
    both = lines("--kinds", "favor_plus,lara", "--resume")
    assert both.items() > first.items()
    assert {case for case, _ in both} == {"tiny, 8 tokens, forward", "tiny, 16 tokens, forward"}
    assert len(lines("--kinds", "eva", "--lengths", "8")) == len(both) + 1
    for wrong, words in ((["--parts", "tension"], "parts must be of"), (["--kinds", "favour"], "kinds must be of")):
        result = CliRunner().invoke(app, wrong)
        assert result.exit_code == 2
        assert words in " ".join(result.output.split())
