"""`evaluate_checkpoint.py`: a checkpoint beside softmax, scores paired row by row, on one process and several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from forked import in_processes
from huggingface_hub import ModelCard
from recipe_runs import ROWS, arguments, forked_measurements, train
from torch import Tensor

import evaluate_checkpoint
from parts.common import RecipeError
from parts.evaluation import paired
from scripts.kill_parts.inputs import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a converted checkpoint `tuned` that was trained on it."""
    path = tmp_path_factory.mktemp("evaluate")
    build(path, ROWS)
    train(arguments(path, path / "tuned", "lara", "--max_steps", "3"))
    return path


def flags(folder: Path, *changes: str) -> list[str]:
    return ["--model_name_or_path", str(folder / "tuned"), "--test_file", str(folder / "data.jsonl"), *changes]


def test_one_process_measures_all(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    changes = ["--repeats", "2", "--timed_batches", "2", "--batch_size", "5", "--output", str(report)]
    with forked_measurements(after=1):
        evaluate_checkpoint.main(flags(folder, *changes))
    found = json.loads(report.read_text())
    assert found["checkpoint"]["attention"] == "lara"
    assert found["original"]["attention"] == "softmax"
    assert found["checkpoint"]["rows"] == found["original"]["rows"] == ROWS
    trained = json.loads((folder / "tuned" / "results.json").read_text())
    assert found["checkpoint"]["accuracy"] == trained["metrics"]["eval"]["eval_accuracy"]
    expected = found["checkpoint"]["accuracy"] - found["original"]["accuracy"]
    assert found["paired"]["difference"] == pytest.approx(expected)
    for side in ("checkpoint", "original"):
        assert found[side]["tokens_per_second"] > 0
        assert found[side]["peak_memory_mib"] > 0
        assert found[side]["tokens_timed"] == found["original"]["tokens_timed"]
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "±" in shown


def measure(argv: list[str]) -> dict[str, Tensor]:
    with forked_measurements():
        evaluate_checkpoint.main(argv)
    return {}


@pytest.mark.parametrize("batch_size", ["5"])  # 24 rows: the last batch has fewer
def test_processes_share_the_rows(folder: Path, tmp_path: Path, batch_size: str) -> None:
    reports = {}
    for count, name in enumerate(("one", "two"), 1):
        changes = ["--repeats", "0", "--batch_size", batch_size, "--output", str(tmp_path / f"{name}.json")]
        in_processes(tmp_path, count, measure, flags(folder, *changes), launched=True)
        reports[name] = json.loads((tmp_path / f"{name}.json").read_text())
    one, two = reports["one"], reports["two"]
    assert (one["processes"], two["processes"]) == (1, 2)
    for side in ("checkpoint", "original"):
        assert {name: one[side][name] for name in ("accuracy", "f1", "rows")} == {
            name: two[side][name] for name in ("accuracy", "f1", "rows")
        }
    assert one["paired"] == two["paired"]


def test_paired_errors() -> None:
    draw = np.random.default_rng(0)
    shared = draw.normal(size=400)
    ours, theirs = shared + 0.1, shared + 0.01 * draw.normal(size=400)
    found = paired(ours, theirs)
    assert found["difference"] == pytest.approx(0.1, abs=3 * found["standard_error"])
    assert found["standard_error"] == pytest.approx(0.01 / 20, rel=0.2)  # of the differences, not of the scores


def test_results_for_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    data = datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: data)
    argv = ["--model_name_or_path", str(folder / "tuned"), "--dataset_name", "some/data", "--split", "validation"]
    args, flags_of_data, _ = evaluate_checkpoint.read_flags([*argv, "--eval_results", "--repeats", "0"])
    jobs = [(args, flags_of_data, str(folder / "tuned"), softmax, "") for softmax in (True, False)]
    monkeypatch.setattr(
        evaluate_checkpoint, "measure_both", lambda *_: [evaluate_checkpoint.measure(*job) for job in jobs]
    )
    found = evaluate_checkpoint.main([*argv, "--eval_results", "--repeats", "0"])
    entries: list[dict[str, Any]] = yaml.safe_load(
        (folder / "tuned" / ".eval_results" / "text_classification.yaml").read_text()
    )
    assert [entry["value"] for entry in entries] == [found["checkpoint"][name] for name in ("accuracy", "f1")]
    assert entries[0]["dataset"] == {"id": "some/data", "task_id": "default"}
    index = ModelCard.load(folder / "tuned" / "README.md").data.eval_results
    assert {(one.dataset_type, one.dataset_split, one.metric_type, one.metric_value) for one in index} == {
        ("some/data", "validation", name, found["checkpoint"][name]) for name in ("accuracy", "f1")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--task", "summarization"], "--task must be one of image_classification, language_modeling"),
        (["--repeats", "-1"], "--repeats must be at least 0"),
        (["--split", "dev"], "--split must be 'validation' or 'test'"),
        (["--labels", "x"], "'--labels' is not a flag of this recipe"),
        (["--model_name_or_path", "nowhere/at-all"], "'nowhere/at-all' cannot be loaded"),
        (["--eval_results"], "--eval_results needs --dataset_name"),
    ],
)
def test_mistakes(folder: Path, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        evaluate_checkpoint.main(flags(folder, *changes))
