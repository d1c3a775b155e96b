"""The command line, on tiny inputs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_linattn
from hf_linattn.bench import memory
from hf_linattn.bench.results import Results
from hf_linattn.cli import bench, main
from hf_linattn.cli.app import app

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
NOTHING_ASKED = {"learned": None, "num_features": None, "num_landmarks": None, "num_chunks": None}
TINY = ["--lengths", "32,64", "--heads", "2", "--head-dim", "16", "--num-features", "16", "--seconds", "0.001"]


def run(*arguments: str, exit_code: int = 0) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
    return " ".join(result.output.split())


def test_help_of_bench() -> None:
    assert "bench" in run("--help")
    text = run("bench", "--help")
    for option in ("--lengths", "--kinds", "--causal", "--peers", "--json", "--plot", "--threads"):
        assert option in text
    assert run("--version").count(".") >= 2


def test_one_run_writes_everything(tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "png", "md")}
    outputs = ["--json", files["json"], "--plot", files["png"], "--markdown", files["md"]]
    text = run("bench", *TINY, "--window", "0,16", *map(str, outputs))
    assert "attention, bidirectional, float32, forward+backward" in text
    results = Results.read(files["json"])
    assert results.is_complete
    names = {row.name for row in results.rows}
    assert {"sdpa", "sdpa:flash", "sdpa:math", "performer-pytorch", "flash-linear-attention"} < names
    assert {"favor_plus", "favor_plus, window 16", "favor_sharp", "lara", "eva, window 64", "eva, window 16"} < names
    assert {row.name for row in results.rows if row.reason} == {"flash-linear-attention"}
    assert len({row.panel for row in results.rows}) == 4  # both directions, both modes
    assert results.options["threads"] == torch.get_num_threads() == 1
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    tables = files["md"].read_text(encoding="utf-8")
    assert tables.count("| favor_plus |") == 4
    files["md"].unlink()
    assert run("bench", "--from-json", str(files["json"]), "--markdown", str(files["md"])).count("favor_plus")
    assert files["md"].read_text(encoding="utf-8") == tables
    files["json"].write_text("{}", encoding="utf-8")
    assert "not benchmark results" in run("bench", "--from-json", str(files["json"]), exit_code=2)


def test_a_run_cut_short_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.RUNS, "memory", stop)
    path = tmp_path / "out.json"
    few = ["--kinds", "lara", "--peers", "sdpa", "--bidirectional", "--mode", "forward"]
    runner.invoke(app, ["bench", "attention", "memory", *TINY, *few, "--json", str(path)])
    results = Results.read(path)
    assert not results.is_complete
    assert {row.work.tokens for row in results.rows} == {32, 64}


def test_memory_and_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([32, 32, 32, 32, 64, 64, 64, 64])  # of three softmaxes and a kind
    monkeypatch.setattr(memory, "peak_bytes", lambda step, device: next(peaks) * 2**20)
    path = tmp_path / "out.json"
    few = ["--kinds", "favor_plus", "--peers", "sdpa", "--bidirectional", "--models", "minilm", "--layers", "1"]
    text = run("bench", "memory", "models", *TINY, *few, "--mode", "forward", "--json", str(path))
    assert "peak memory of a training step, bidirectional, float32" in text
    assert "│ favor_plus │ 32.0 MiB │ 64.0 MiB │ 1.00 │" in text
    assert "minilm, bidirectional, float32, forward" in text
    found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["benchmark"] for row in found} == {"memory", "models"}
    assert all("reason" not in row for row in found)


@pytest.mark.parametrize(
    ("benchmark", "given", "expected"),
    [
        ("models", {}, [("64", False), ("preset", True)]),
        ("models", {"learned": True}, [("preset", True)]),
        ("models", {"learned": False, "num_features": 7}, [("7", False)]),
        ("models", {"num_features": 7}, [("7", False), ("7", True)]),
        ("attention", {}, [("256", False)]),
        ("attention", {"learned": True}, [("preset", True)]),
        ("generation", {}, [("256", False)]),
    ],
)
@pytest.mark.parametrize("exact_below", [0, 300])
def test_settings_of_a_plan(benchmark: str, given: dict, expected: list, exact_below: int) -> None:
    """Which maps, with how many features; those exact below a length come last."""
    asked = {**NOTHING_ASKED, **given, "exact_below": exact_below}
    options = bench._settings(benchmark, asked)
    made = [(str(one.num_features or "preset"), one.learned) for one in options if not one.exact_below]
    assert made == expected
    last = options[len(expected) :]
    assert [one.exact_below for one in last] == [exact_below] * bool(exact_below)
    assert all(replace(one, exact_below=0) == options[0] for one in last)


def test_lengths_and_rows_of_models() -> None:
    given = {**NOTHING_ASKED, "kinds": ("eva",), "exact_below": 0, "lengths": None, "batch": None, "device": "cpu"}
    given |= {"causal": None, "mode": "both", "peers": None, "windows": None, "models": None, "dtypes": ("float32",)}
    given |= {"max_softmax_length": None}
    plan = bench.make_plan("models", given)
    assert plan.lengths == (128, 197, 256, 512, 1024, 4096)
    assert (plan.batch, plan.most_tokens, plan.windows) == (8, 8192, (None,))
    assert [contender.name for contender in plan.kind_contenders()] == ["eva", "eva, learned"]
    assert (bench.make_plan("models", {**given, "batch": 16}).most_tokens, bench.make_plan("memory", given).batch) == (
        None,
        1,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kinds", "favour_plus"], ["favor_plus", "eva", "Did you mean 'favor_plus'?"]),
        (["--peers", "performer"], ["sdpa", "performer-pytorch", "flash-linear-attention"]),
        (["--dtype", "float8"], ["float32", "bfloat16", "float16"]),
        (["--models", "t5", "models"], ["minilm", "gpt2", "vit"]),
        (["--mode", "backward"], ["forward", "forward+backward", "both"]),
        (["--lengths", "12,many"], ["--lengths", "12,many"]),
        (["--lengths", ""], ["at least one"]),
        (["--window", "-1"], ["window_size"]),
        (["--seconds", "0"], ["seconds"]),
        (["speed"], ["attention", "memory", "models", "all"]),
    ],
)
def test_wrong_arguments_name_the_right_ones(arguments: list[str], words: list[str]) -> None:
    text = run("bench", *TINY, *arguments, exit_code=2).replace("│", "")
    text = " ".join(text.split())
    assert all(word in text for word in words), text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert "needs a GPU" in run("bench", "--device", "cuda", exit_code=2)


def test_bench_as_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-linattn", "--version"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == hf_linattn.__version__


def test_without_its_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("typer", "hf_linattn.cli.app"):
        monkeypatch.setitem(sys.modules, name, None) if name == "typer" else monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "hf_linattn.cli.bench")
    with pytest.raises(SystemExit, match=r"needs typer, which is not installed: pip install 'hf-linattn\[cli\]'"):
        main()
