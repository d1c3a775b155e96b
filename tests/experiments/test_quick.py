"""The comparison of two versions: its arithmetic, the sessions and the verdicts, on measurements that are made up."""

from __future__ import annotations

import math
import random
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]
HERE, THERE = Path("here"), Path("there")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import quick

    return quick


def compare(quick: ModuleType, monkeypatch: pytest.MonkeyPatch, after: Any, minutes: float = 0.0) -> tuple[dict, list]:
    """(ratios, order of the versions measured): one version has figures 1 and 2, the other those of `after()`."""
    order: list[Path] = []

    def measure(package: Path, runs: Any) -> dict[str, float | None]:
        order.append(package)
        return {"a": 1.0, "b": 2.0} if package == HERE else after()

    monkeypatch.setattr(quick, "measure", measure)
    clock = iter(range(0, 6000, 60))  # a minute passes whenever somebody looks
    monkeypatch.setattr(quick.time, "monotonic", lambda: next(clock))
    return quick.compare([HERE, THERE], quick.RUNS, minutes or 1e9), order


@pytest.mark.parametrize(
    ("factor", "verdict", "status"), [(0.5, "fine", 0), (1.02, "fine", 0), (1.05, "fine", 1), (1.3, "slower", 1)]
)
def test_verdicts_of_quick(
    factor: float, verdict: str, status: int, quick: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean may be too large where no figure is. Who is measured first alternates."""
    found, order = compare(quick, monkeypatch, lambda: {"a": factor, "b": 2 * factor})
    assert found == {name: [factor] * 3 for name in "ab"}
    assert quick.verdict(found["a"]) == verdict
    assert quick.summarize(found)[0] == status
    assert order == [HERE, THERE, THERE, HERE, HERE, THERE]


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_decide(seed: int, quick: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interruptions of up to 0.3 times a figure's own time: equal versions stay equal, slower ones slower."""
    source = random.Random(seed)
    for factor, verdict in ((1.0, "fine"), (1.5, "slower")):
        noisy = lambda factor=factor: {"a": factor * (1 + 0.3 * source.random() ** 4)}  # noqa: E731
        found, _ = compare(quick, monkeypatch, noisy)
        assert quick.verdict(found["a"]) == verdict


def test_what_may_be_noise_is_repeated(quick: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([1.3, 1.3, 1.0, 1.3, *[1.0] * 9])
    found, order = compare(quick, monkeypatch, lambda: {"a": next(values), "b": 2.0})
    assert quick.summarize(found)[0] == 0
    assert len(order) == 2 * 7  # until most of them are 1.0
    values = iter([1.3, 1.3, 1.0, *[1.3] * 9])
    found, order = compare(quick, monkeypatch, lambda: {"a": next(values), "b": 2.0}, minutes=9)
    assert len(order) == 2 * 3  # no time for another session
    status, words = quick.summarize(found)
    assert (status, "unsettled: a" in words) == (1, True)  # the mean is too large all the same
    assert quick.summarize({**found, "c": [0.5]})[0] == 2


def test_what_fails_is_named(quick: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = compare(quick, monkeypatch, lambda: {"a": None, "b": 2.0, "new": 1.0})
    assert found == {"a": [math.inf] * 3, "b": [1.0] * 3}
    status, words = quick.summarize(found)
    assert status == 1
    assert "slower: a" in words
    with pytest.raises(ValueError, match="No figure could be measured"):
        quick.summarize({})


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


def test_figures_are_of_the_checkout_that_was_given(quick: ModuleType, tmp_path: Path) -> None:
    """A package that is none, and this one."""
    fake = tmp_path / "hf_linattn" / "cli"
    fake.mkdir(parents=True)
    (fake.parent / "__init__.py").touch()
    (fake / "__init__.py").write_text("raise SystemExit(7)")
    run = "attention --kinds lara,eva --bidirectional --mode forward --lengths 32 --seconds 0.001"
    with pytest.raises(subprocess.CalledProcessError, match="status 7"):
        quick.measure(tmp_path, [run])
    found = quick.measure(ROOT, [run])
    start = "attention, bidirectional, float32, forward, 32: "
    assert set(found) == {f"{start}lara", f"{start}eva, window 64"}
    assert all(value > 0 for value in found.values())
