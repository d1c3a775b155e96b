"""The comparison of two versions: its arithmetic, the turns and the verdicts, with measurements that are made up."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quick() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "experiments"))
    yield importlib.import_module("quick")
    sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture(scope="module")
def parts(quick: ModuleType) -> Callable[[str], ModuleType]:
    return lambda name: importlib.import_module(f"quick_parts.{name}")


class Machine:
    """Two versions with a factor between them, on a machine that does other things now and then."""

    def __init__(self, factor: float, noise: float = 0.0, broken: str = "", seed: int = 0) -> None:
        self.factor, self.noise, self.broken = factor, noise, broken
        self.random = random.Random(seed)
        self.asked: list[str] = []

    def side(self, name: str) -> Any:
        machine = self

        class Side:
            def ask(self, **request: Any) -> float:
                if machine.broken == name:
                    raise importlib.import_module("quick_parts.turns").MeasurementError("ImportError: no such thing")
                if "calls" in request:
                    machine.asked.append(name)
                slow = 1 + machine.noise * machine.random.random() ** 4
                return 0.1 * slow * (machine.factor if name == "after" else 1.0)

        return Side()


def rows(parts: Any, machine: Machine, sessions: int = 3) -> list[Any]:
    figure = parts("figures").all_figures()[0]
    found = {figure.name: parts("comparison").Comparison(figure.name, figure.group)}
    for session in range(sessions):
        both = [machine.side("before"), machine.side("after")]
        parts("turns").run_session(session, [figure], found, both, seconds=2.0)
    return list(found.values())


def test_the_set(parts: Any) -> None:
    """Every kind, length, direction, mode, family, with one thread and with two."""
    figures = parts("figures").all_figures()
    names = [figure.name for figure in figures]
    assert len(set(names)) == len(names) >= 100
    for kind in ("favor_plus", "favor_sharp", "lara", "eva"):
        for tokens in (256, 1024, 4096):
            for mode in ("forward", "forward+backward"):
                assert f"{kind} bidirectional {mode} {tokens}, 1 thread" in names
                assert f"{kind} causal {mode} {tokens}, 1 thread" in names
        for family in ("bert", "gpt2", "vit"):
            assert f"{family} {kind} forward, 1 thread" in names
            assert f"{family} {kind} training step, 2 threads" in names
        assert f"gpt2 {kind} generation, 1 thread" in names
    assert {"import", "convert, save and load"} < set(names)
    assert {figure.threads for figure in figures} == {1, 2}


@pytest.mark.parametrize(
    ("factor", "verdict", "status"), [(0.5, "fine", 0), (1.0, "fine", 0), (1.02, "fine", 0), (1.3, "slower", 1)]
)
def test_verdicts(factor: float, verdict: str, status: int, parts: Any) -> None:
    found = rows(parts, Machine(factor))
    assert found[0].verdict == verdict
    assert found[0].ratio == pytest.approx(factor)
    assert parts("comparison").summarize(found).status == status


def test_the_mean_may_be_too_large_where_no_figure_is(parts: Any) -> None:
    found = parts("comparison").summarize(rows(parts, Machine(1.05)))
    assert (found.slower, found.unsettled, found.status) == ([], [], 1)


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_decide(seed: int, parts: Any) -> None:
    """Interruptions of up to 0.6 times a sample's own time: equal versions stay equal, slower ones slower."""
    equal, slower = (rows(parts, Machine(factor, noise=0.6, seed=seed))[0] for factor in (1.0, 1.5))
    assert equal.verdict == "fine"
    assert slower.verdict == "slower"


def test_what_may_be_noise_is_unsettled(parts: Any) -> None:
    comparison = parts("comparison")
    row = comparison.Comparison("x", "model")
    row.add(0, [(1.0, after) for after in (1.0, 1.05, 1.12, 1.2, 1.25, 1.3)])
    row.add(1, [(0.8, 1.3)] * 3)  # another pair of processes, where it is clear
    assert row.verdict == "unsettled"
    assert row.is_doubtful
    found = comparison.summarize([row])
    assert (found.unsettled, found.slower) == (["x"], [])


def test_turns_alternate_and_samples_are_long_enough(parts: Any) -> None:
    machine = Machine(1.0)
    rows(parts, machine, sessions=2)
    half = len(machine.asked) // 2
    first, second = machine.asked[:half], machine.asked[half:]
    assert first[:8] == ["before", "after", "after", "before"] * 2
    assert second[:8] == ["after", "before", "before", "after"] * 2


@pytest.mark.parametrize(("broken", "status"), [("after", 1), ("before", 0)])
def test_a_figure_that_fails_is_named(broken: str, status: int, parts: Any, quick: ModuleType) -> None:
    comparison = parts("comparison")
    (lost,) = rows(parts, Machine(1.0, broken=broken))
    assert lost.verdict == "not measured"
    assert not lost.is_doubtful
    assert "no such thing" in lost.reason[broken]
    (good,) = rows(parts, Machine(1.0))
    found = comparison.summarize([lost, good])
    assert found.status == status
    assert ("failing in the later version" in quick.explain(found)) == (broken == "after")
    quick.show([lost, good], found)
    with pytest.raises(ValueError, match="No figure could be measured"):
        comparison.summarize([lost])


@pytest.mark.parametrize("count", [1, 5, 6, 9, 20, 60])
def test_intervals_cover_the_median(count: int, parts: Any) -> None:
    generator = random.Random(0)
    hits = 0
    for _ in range(400):
        low, high = parts("comparison").median_interval([generator.gauss(1.0, 0.2) for _ in range(count)])
        hits += low <= 1.0 <= high
    assert hits / 400 >= (0.93 if count >= 6 else 0.0)


def test_results_hold_no_path(parts: Any, quick: ModuleType) -> None:
    found = rows(parts, Machine(1.0))
    summary = parts("comparison").summarize(found)
    text = json.dumps(quick.content(found, summary, {"before": "abc", "after": "def"}))
    assert str(ROOT) not in text
    assert json.loads(text)["rows"][0]["pairs"] == len(found[0].pairs)


def test_doubtful_figures_are_repeated(parts: Any, quick: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = parts("figures").all_figures()[:2]
    asked: list[list[str]] = []

    def session(number: int, chosen: list[Any], found: dict[str, Any], both: Any, seconds: float, end: float) -> None:
        asked.append([figure.name for figure in chosen])
        for figure in chosen:
            after = 1.0 if figure is figures[0] else (1.3 if number < 4 else 0.5)
            pairs = [(1.0, after), (1.0, 1.0)] * 3 if figure is figures[1] else [(1.0, after)] * 6
            found[figure.name].add(number, pairs)

    class Both:
        def __enter__(self) -> list[Any]:
            return []

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(quick, "workers", lambda checkouts: Both())
    monkeypatch.setattr(quick, "run_session", session)
    monkeypatch.setattr(quick.time, "monotonic", iter(range(40)).__next__)
    quick.compare(figures, [], 1.0, minutes=0.5)
    assert [len(names) for names in asked[:3]] == [2, 2, 2]
    assert all(names == [figures[1].name] for names in asked[3:])
    assert len(asked) > 3


def test_the_time_is_kept_and_what_was_not_reached_is_named(parts: Any, quick: ModuleType) -> None:
    (good,) = rows(parts, Machine(1.0))
    figure = parts("figures").all_figures()[1]
    late = parts("comparison").Comparison(figure.name, figure.group)
    parts("turns").run_session(0, [figure], {figure.name: late}, [], 1.0, end=0.0)
    assert not late.sessions
    found = parts("comparison").summarize([good, late])
    assert (found.missing, found.status) == ([figure.name], 2)
    assert figure.name in quick.explain(found)
    quick.show([good, late], found)


def test_checkouts(parts: Any, tmp_path: Path) -> None:
    checkouts = parts("checkouts")
    with checkouts.checkout(str(ROOT)) as folder:
        assert folder == ROOT
    with pytest.raises(ValueError, match="without the package"), checkouts.checkout(str(tmp_path)):
        pass
    with pytest.raises(ValueError, match="neither a folder nor a revision"), checkouts.checkout("no-such-revision"):
        pass


def test_a_revision_is_unpacked(parts: Any, tmp_path: Path) -> None:
    package = tmp_path / "hf_linattn"
    package.mkdir()
    (package / "__init__.py").write_text("one")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    (package / "__init__.py").write_text("two")
    with parts("checkouts").checkout("HEAD", tmp_path) as folder:
        assert (folder / "hf_linattn" / "__init__.py").read_text() == "one"
    assert not folder.exists()
    assert parts("checkouts").revision(str(tmp_path)).endswith(", edited")


def test_unknown_figures_are_refused(quick: ModuleType) -> None:
    with pytest.raises(typer.BadParameter, match="No figure has 'nothing' in its name"):
        quick.main(before="HEAD", only="nothing")


def test_a_worker_measures_the_checkout_it_was_given(parts: Any, tmp_path: Path) -> None:
    turns = parts("turns")
    figure = next(figure for figure in parts("figures").all_figures() if figure.name.startswith("eva bidirectional"))
    with turns.workers([ROOT]) as (worker,):
        assert 0 < worker.ask(figure=figure.name) < 60
        assert 0 < worker.ask(figure=figure.name, calls=2) < 60
        with pytest.raises(turns.MeasurementError, match="has not been built"):
            worker.ask(figure="import", calls=1)
        with pytest.raises(turns.MeasurementError, match="KeyError"):
            worker.ask(figure="nothing")
