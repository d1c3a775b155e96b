"""`hf-linattn bench generation`, on tiny inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_linattn.bench.generation import LENGTHS
from hf_linattn.bench.report import BEGIN, END
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
    path, readme, plot = tmp_path / "out.json", tmp_path / "README.md", tmp_path / "out.png"
    readme.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    few = ["--kinds", "favor_plus,eva", "--lengths", "16,48", "--max-chunks", "4"]
    text = run("generation", *TINY, *few, "--json", str(path), "--plot", str(plot))
    assert "generation, gpt2 (1 layers), float32" in text
    assert "48 : 16" in text
    results = Results.read(path)
    assert results.is_complete
    assert {row.name.replace(", window 8", "") for row in results.rows} == {
        "sdpa",
        "favor_plus",
        "eva",
        "eva, at most 4 chunks",
    }
    assert all(row.mean and row.state and not row.reason for row in results.rows)
    assert results.options["decoder"]["max_chunks"] == 4
    assert results.options["lengths"] == [16, 48]
    assert results.environment["hardware"]["threads"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    run("--from-json", str(path), "--readme", str(readme))
    assert readme.read_text(encoding="utf-8").count("| favor_plus, window 8 |") == 2


@pytest.mark.parametrize(
    ("given", "lengths", "limit", "chunks"),
    [
        ([], LENGTHS, None, 64),
        (["--lengths", "5", "--max-softmax-length", "7", "--max-chunks", "0"], (5,), 7, None),
    ],
)
def test_its_own_defaults(
    monkeypatch: pytest.MonkeyPatch, given: list[str], lengths: tuple[int, ...], limit: int | None, chunks: int | None
) -> None:
    """Contexts up to 65536 tokens, and no limit for softmax, whose steps are linear."""
    asked = []

    def record(plan, decoder, **options):
        asked.append((plan.lengths, plan.max_softmax_length, decoder.max_chunks, decoder.layers, options["windows"]))
        return iter(())

    monkeypatch.setattr(bench, "run_generation", record)
    run("generation", *given)
    assert asked == [(lengths, limit, chunks, 4, (None,))]


def test_a_checkpoint_that_is_not_there() -> None:
    assert "nowhere" in run("generation", *TINY, "--model", "./nowhere", exit_code=2)
