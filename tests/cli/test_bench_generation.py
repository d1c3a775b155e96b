"""`hf-linattn bench generation`, on tiny inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_linattn.bench.generation import CONTEXTS
from hf_linattn.bench.results import Results
from hf_linattn.cli import bench
from hf_linattn.cli.app import app

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
TINY = ["--heads", "2", "--head-dim", "8", "--num-features", "8", "--layers", "1", "--seconds", "0.001"]
TINY += ["--window", "8", "--chunk-size", "4"]


def run(*arguments: str, exit_code: int = 0) -> str:
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
    return " ".join(result.output.replace("│", "").split())


def test_a_run_and_its_tables(tmp_path: Path) -> None:
    path, plot = tmp_path / "out.json", tmp_path / "out.png"
    few = ["--kinds", "favor_plus,eva", "--lengths", "16,48", "--max-chunks", "4"]
    text = run("generation", *TINY, *few, "--json", str(path), "--plot", str(plot))
    assert "generation, gpt2 (1 layers), float32" in text
    assert "slope from 16" in text
    results = Results.read(path)
    assert results.is_complete
    assert {row.name.replace(", window 8", "") for row in results.rows} == {
        "sdpa",
        "favor_plus",
        "eva",
        "eva, at most 4 chunks",
    }
    assert all(row.median and row.state and not row.reason for row in results.rows)
    assert results.options["max_chunks"] == 4
    assert results.options["lengths"] == [16, 48]
    assert results.environment["hardware"]["threads"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "lengths", "limit", "chunks"),
    [
        ([], CONTEXTS, None, 64),
        (["--lengths", "5", "--max-softmax-length", "7", "--max-chunks", "0"], (5,), 7, 0),
    ],
)
def test_its_own_defaults(
    monkeypatch: pytest.MonkeyPatch, given: list[str], lengths: tuple[int, ...], limit: int | None, chunks: int
) -> None:
    """Contexts up to 65536 tokens, and no limit for softmax, whose steps are linear."""
    asked = []

    def record(plan, report):
        asked.append((plan.lengths, plan.max_softmax_length, plan.max_chunks, plan.layers, plan.windows))
        return iter(())

    monkeypatch.setitem(bench.RUNS, "generation", record)
    run("generation", *given)
    assert asked == [(lengths, limit, chunks, None, (None,))]


def test_a_checkpoint_that_is_not_there() -> None:
    assert "nowhere" in run("generation", *TINY, "--model", "./nowhere", exit_code=2)
