"""Text classification beyond two classes: the tasks of GLUE, regression, test sets without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from recipe_runs import ROWS, arguments

import text_classification
from hf_linattn.errors import InputError
from parts.common import RecipeError
from parts.glue import TASKS
from parts.metrics import METRICS
from scripts.kill_parts.inputs import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("glue")
    build(path, ROWS)
    return path


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], Any]:
    """GLUE as on the Hub, with the texts of the folder; what was asked for."""
    asked: dict[tuple[str, ...], Any] = {}
    texts = [json.loads(line)["text"] for line in (folder / "data.jsonl").read_text().splitlines()]

    def load(path: str, name: str, **options: Any) -> datasets.DatasetDict:
        task = TASKS[name]
        feature = datasets.Value("float32") if name == "stsb" else datasets.ClassLabel(names=["yes", "no"])
        labels = [i / 5 if name == "stsb" else i % 2 for i in range(ROWS)]
        columns: dict[str, Any] = {task.text: texts, "idx": list(range(ROWS))} | (
            {task.pair: texts[::-1]} if task.pair else {}
        )
        found = {}
        for split in ("train", *task.validation, *task.test):
            data = datasets.Dataset.from_dict(columns | {"label": [-1] * ROWS if split in task.test else labels})
            found[split] = data.cast_column("label", feature)
        asked[path, name] = found
        return datasets.DatasetDict(found)

    monkeypatch.setattr("datasets.load_dataset", load)
    return asked


def run(folder: Path, output: Path, *flags: str) -> dict[str, Any]:
    """Two steps, on the data of the Hub."""
    argv = arguments(folder, output, "favor_plus", "--max_steps", "2", *flags)
    for name in ("--train_file", "--validation_file"):
        del argv[argv.index(name) : argv.index(name) + 2]
    return text_classification.main(argv, quiet=True)


@pytest.mark.parametrize("name", ["cola", "mnli", "stsb", "qqp"])
def test_a_task(name: str, folder: Path, tmp_path: Path, hub: dict[tuple[str, ...], Any]) -> None:
    found = run(folder, tmp_path, "--task_name", name, "--do_predict")
    assert list(hub) == [("nyu-mll/glue", name)]
    task = TASKS[name]
    splits = ["eval"] + (["eval_mismatched"] if name == "mnli" else [])
    for split in splits:
        assert {f"{split}_{metric}" for metric in task.metrics} <= set(found["metrics"][split])
    assert (found["data"]["text"], found["data"]["pair"]) == (task.text, task.pair)
    for path in ["predictions.tsv"] + (["predictions_mismatched.tsv"] if name == "mnli" else []):
        lines = (tmp_path / path).read_text().splitlines()
        assert lines[0] == "index\tprediction"
        assert len(lines) == ROWS + 1
        if name == "stsb":
            float(lines[1].split("\t")[1])
        else:
            assert {line.split("\t")[1] for line in lines[1:]} <= {"yes", "no"}


def test_the_metrics_of_the_paper() -> None:
    """Table 1 of arXiv:1804.07461; accuracy where it names no other."""
    found = {name: set(task.metrics) for name, task in TASKS.items() if task.metrics != ("accuracy",)}
    assert found == {
        "cola": {"matthews_correlation"},
        "mrpc": {"accuracy", "f1"},
        "qqp": {"accuracy", "f1"},
        "stsb": {"pearson", "spearmanr"},
    }
    assert set().union(*found.values()) <= set(METRICS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_name", "sst3"], "--task_name must be one of cola, mnli"),
        (["--task_name", "cola", "--label_column", "idx", "--max_eval_samples", "0"], "must be at least 1"),
        (["--task_name", "mrpc", "--text_pair_column", "premise"], "--text_pair_column 'premise' is not a column"),
        (["--task_name", "cola", "--text_column", "premise"], "'premise' is not a column of the data"),
    ],
)
def test_mistakes(
    flags: list[str], message: str, folder: Path, tmp_path: Path, hub: dict[tuple[str, ...], Any]
) -> None:
    with pytest.raises((RecipeError, InputError), match=message):
        run(folder, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "must hold class labels"),
        (7, "do not fit those of the checkpoint"),
    ],
)
def test_labels_that_do_not_fit(label: Any, message: str, folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rows[3]["label"] = label
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = arguments(folder, tmp_path / "out", "softmax", "--validation_file", str(tmp_path / "other.jsonl"))
    argv.remove("--do_train")
    with pytest.raises(RecipeError, match=message):
        text_classification.main(argv, quiet=True)


@pytest.mark.parametrize("labels", [["no", "yes"], [0.5, 1.5]], ids=["classes", "numbers"])
@pytest.mark.parametrize("unknown", [True, False], ids=["unknown labels", "no column"])
def test_a_checkpoint_predicts_for_texts_alone(labels: list[Any], unknown: bool, folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["label"] = labels[i % 2]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": row["text"], **({"label": -1} if unknown else {})} for row in rows[:5]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    data = ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "train.jsonl")]
    text_classification.main(arguments(folder, tmp_path / "run", "eva", "--max_steps", "1", *data), quiet=True)
    argv = ["--model_name_or_path", str(tmp_path / "run"), "--test_file", str(tmp_path / "texts.jsonl")]
    argv += ["--do_predict", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    text_classification.main(argv, quiet=True)
    lines = (tmp_path / "out" / "predictions.tsv").read_text().splitlines()
    found = [line.split("\t")[1] for line in lines[1:]]
    assert len(found) == 5
    if labels == ["no", "yes"]:
        assert set(found) <= set(labels)
    else:
        assert [float(each) for each in found]
