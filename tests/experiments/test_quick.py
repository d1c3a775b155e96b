"""The comparison of two versions: its arithmetic, the turns and the verdicts, with measurements that are made up."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quick() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "experiments"))
    yield importlib.import_module("quick")
    sys.path.remove(str(ROOT / "experiments"))


def machine(quick: ModuleType, factor: float, noise: float = 0.0, broken: str = "", seed: int = 0) -> dict[str, Any]:
    """Two versions with a factor between them, on a machine that does other things now and then."""
    source = random.Random(seed)

    def ask(side: str, **_: Any) -> float:
        if side == broken:
            raise quick.MeasurementError("ImportError: no such thing")
        return 0.1 * (1 + noise * source.random() ** 4) * (factor if side == "after" else 1.0)

    return {
        side: SimpleNamespace(ask=lambda side=side, **request: ask(side, **request)) for side in ("before", "after")
    }


def measured(quick: ModuleType, *given: Any, **options: Any) -> Any:
    row = quick.Comparison("figure")
    for session in range(3):
        quick.run_session(session, [row], machine(quick, *given, **options), seconds=2.0)
    return row


def test_figures_of_the_quick_set(quick: ModuleType) -> None:
    """Every kind, length, direction, mode, family, with one thread and with two."""
    figures = quick.all_figures()
    names = [figure.name for figure in figures]
    assert len(set(names)) == len(names) == 106
    for kind in ("favor_plus", "favor_sharp", "lara", "eva"):
        assert f"{kind} bidirectional forward 256, 1 thread" in names
        assert f"{kind} causal forward+backward 4096, 2 threads" in names
        assert f"vit {kind} training step, 2 threads" in names
        assert f"gpt2 {kind} generation, 1 thread" in names
    assert {"import", "convert, save and load"} < set(names)


@pytest.mark.parametrize(
    ("factor", "verdict", "status"), [(0.5, "fine", 0), (1.02, "fine", 0), (1.05, "fine", 1), (1.3, "slower", 1)]
)
def test_verdicts_of_quick(factor: float, verdict: str, status: int, quick: ModuleType) -> None:
    """The mean may be too large where no figure is."""
    row = measured(quick, factor)
    assert row.verdict == verdict
    assert row.ratio == pytest.approx(factor)
    assert quick.summarize([row])[0] == status


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_decide(seed: int, quick: ModuleType) -> None:
    """Interruptions of up to 0.6 times a sample's own time: equal versions stay equal, slower ones slower."""
    assert measured(quick, 1.0, noise=0.6, seed=seed).verdict == "fine"
    assert measured(quick, 1.5, noise=0.6, seed=seed).verdict == "slower"


def test_what_may_be_noise_is_unsettled(quick: ModuleType) -> None:
    row = quick.Comparison("figure")
    row.sessions = {0: [(1.0, 1.05), (1.0, 1.08)], 1: [(0.9, 1.3)] * 3}
    assert row.is_doubtful
    row.sessions[2] = [(0.9, 1.3)] * 3
    assert row.verdict == "unsettled"
    assert quick.summarize([row, measured(quick, 0.5)])[0] == 2


def test_who_goes_first_alternates(quick: ModuleType) -> None:
    asked: list[str] = []
    sides = {
        side: SimpleNamespace(ask=lambda side=side, **request: asked.append(side) or 0.1)
        for side in ("before", "after")
    }
    assert quick.take_turns("figure", sides, seconds=0.8) == [(0.1, 0.1)] * 4
    assert asked[2:] == ["before", "after", "after", "before"] * 2
    del asked[:]
    quick.take_turns("figure", sides, seconds=0.8, swap=True)
    assert asked[2:4] == ["after", "before"]


@pytest.mark.parametrize(("broken", "status"), [("before", 0), ("after", 1)])
def test_what_fails_is_named(broken: str, status: int, quick: ModuleType) -> None:
    lost, good = measured(quick, 1.0, broken=broken), measured(quick, 1.0)
    assert (lost.verdict, lost.is_doubtful) == ("not measured", False)
    assert "no such thing" in lost.reason[broken]
    found, words = quick.summarize([lost, good])
    assert found == status
    assert ("failing after: figure" in words) == (broken == "after")
    assert [line[-1].split()[0] for line in quick.lines([lost, good])] == ["not", "fine"]
    with pytest.raises(ValueError, match="No figure could be measured"):
        quick.summarize([lost])


def test_doubtful_figures_are_repeated(quick: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = quick.all_figures()[:2]
    asked: list[list[str]] = []

    def session(number: int, chosen: list[Any], *_: Any) -> None:
        asked.append([row.name for row in chosen])
        for row in chosen:
            row.sessions[number] = [(1.0, 1.0 if row.name == figures[0].name or number % 2 else 1.3)]

    monkeypatch.setattr(quick, "Worker", lambda package, folder: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(quick, "run_session", session)
    monkeypatch.setattr(quick.time, "monotonic", iter(range(40)).__next__)
    quick.compare(figures, [ROOT, ROOT], 1.0, minutes=0.3)
    assert [len(names) for names in asked[:3]] == [2, 2, 2]
    assert len(asked) > 3
    assert all(names == [figures[1].name] for names in asked[3:])


def test_what_was_not_reached_is_named(quick: ModuleType) -> None:
    late = quick.Comparison("late")
    quick.run_session(0, [late], {}, 1.0, end=0.0)
    found, words = quick.summarize([measured(quick, 1.0), late])
    assert found == 2
    assert "not reached: late" in words


def test_checkouts_of_quick(quick: ModuleType, tmp_path: Path) -> None:
    with quick.checkout(str(ROOT)) as folder:
        assert folder == ROOT
    for source in (str(tmp_path), "no-such-revision"):
        with pytest.raises(typer.BadParameter, match="neither a checkout"), quick.checkout(source):
            pass
    package = tmp_path / "hf_linattn"
    package.mkdir()
    (package / "__init__.py").write_text("one")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    (package / "__init__.py").write_text("two")
    with quick.checkout("HEAD", tmp_path) as folder:
        assert (folder / "hf_linattn" / "__init__.py").read_text() == "one"
    assert not folder.exists()
    assert quick.revision(str(tmp_path)).endswith("-dirty")


def test_unknown_figures_are_refused(quick: ModuleType) -> None:
    with pytest.raises(typer.BadParameter, match="No figure has 'nothing' in its name"):
        quick.main(before="HEAD", only="nothing")


def test_a_worker_measures_the_checkout_it_was_given(quick: ModuleType, tmp_path: Path) -> None:
    name = next(figure.name for figure in quick.all_figures() if figure.name.startswith("eva bidirectional"))
    worker = quick.Worker(ROOT, str(tmp_path))
    try:
        assert 0 < worker.ask(figure=name) < 60
        assert 0 < worker.ask(figure=name, calls=2) < 60
        with pytest.raises(quick.MeasurementError, match="KeyError"):
            worker.ask(figure="nothing")
    finally:
        worker.close()
