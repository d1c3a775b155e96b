"""The recipe on tiny data: every task trains, is resumed and scored; published files are read; mistakes are told."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from recipe_runs import assert_same_weights, pushed, two_processes

import build_long_range_arena
import long_range_arena
from hf_linattn.errors import InputError
from lra.data import ArenaDataArguments
from lra.model import BertForLongRangeArena
from lra.tasks import TASKS
from parts.common import RecipeError
from parts.common import run as run_program
from parts.finetuning import read_flags
from parts.labels import Labels
from parts.metrics import CLASSIFICATION
from text_classification import score

CONFIGS = sorted(Path("recipes/configs/lra").glob("*.yaml"))
ROWS = 12
RECIPE = "recipes/long_range_arena.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet file for every task, called by its name."""
    path = tmp_path_factory.mktemp("arena")
    generate("listops", path / "listops.parquet", "--min_length", "20", "--max_length", "60")
    generate("pathfinder", path / "pathfinder.parquet", "--contour_length", "4")
    texts = [f"{'a good film' if i % 2 else 'dull'}, it is said, number {i}" for i in range(40)]
    pq.write_table(pa.table({"text": texts, "label": [i % 2 for i in range(40)]}), path / "text.parquet")
    (path / "verses.jsonl").write_text("".join(json.dumps({"text": f"o {i} verse"}) + "\n" for i in range(60)))
    sources = ["--sources", str(path / "text.parquet"), str(path / "verses.jsonl"), "--length", "60"]
    generate("matching", path / "matching.parquet", *sources)
    rng = np.random.default_rng(0)
    images = []
    for index in range(ROWS):
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path / f"{index}.png")
        images.append({"bytes": (path / f"{index}.png").read_bytes(), "path": None})
    pq.write_table(pa.table({"img": images, "label": list(range(10)) + [0, 1]}), path / "image.parquet")
    return path


def generate(task: str, output: Path, *flags: str) -> None:
    build_long_range_arena.main([task, "--rows", str(ROWS), "--output", str(output), *flags])


def flags(folder: Path, output: Path, task: str, *changes: str) -> list[str]:
    values: dict[str, Any] = {
        "task": task,
        "train_file": folder / f"{task}.parquet",
        "validation_file": folder / f"{task}.parquet",
        "output_dir": output,
        "hidden_size": 16,
        "intermediate_size": 16,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "disable_tqdm": "true",
        "report_to": "none",
    }
    return [*(str(text) for name, value in values.items() for text in (f"--{name}", value)), *DO, *changes]


DO = ("--do_train", "--do_eval")


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


# -- training ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "kind", "pooling"),
    [
        ("listops", "softmax", "mean"),
        ("listops", "favor_plus", "cls"),
        ("text", "favor_sharp", "mean"),
        ("matching", "lara", "cls"),
        ("image", "eva", "mean"),
        ("pathfinder", "favor_plus", "mean"),
    ],
)
def test_every_task_trains(folder: Path, tmp_path: Path, task: str, kind: str, pooling: str) -> None:
    changes = ["--pooling", pooling, *(["--window_size", "4"] if kind != "softmax" else [])]
    found = long_range_arena.main(flags(folder, tmp_path, task, "--attention", kind, *changes))
    assert found == results(tmp_path) | {"log": found["log"]}
    assert found["attention"]["kind"] == kind
    assert 0 <= found["metrics"]["eval"]["eval_accuracy"] <= 1
    assert found["log"][-1]["step"] == 2
    model = BertForLongRangeArena.from_pretrained(tmp_path)
    assert model.config.num_labels == TASKS[task].num_labels
    assert (getattr(model.config, "linear_attention", None) or {"kind": "softmax"})["kind"] == kind


def test_the_tasks_can_be_learned(folder: Path, tmp_path: Path) -> None:
    """Texts say their label in a word; so few rows are learned by heart in any task that reads its inputs."""
    changes = ["--attention", "eva", "--window_size", "4", "--max_steps", "40", "--save_strategy", "no"]
    found = long_range_arena.main(flags(folder, tmp_path, "text", *changes, "--dropout", "0"))
    assert found["metrics"]["eval"]["eval_accuracy"] > 0.9


@pytest.mark.parametrize("task", ["listops", "matching"])
def test_a_run_that_was_cut_short_ends_with_the_same_weights(folder: Path, tmp_path: Path, task: str) -> None:
    common = ["--attention", "favor_sharp", "--window_size", "4", "--max_steps", "4", "--save_steps", "2"]
    common += ["--lr_scheduler_type", "constant"]
    long_range_arena.main(flags(folder, tmp_path / "whole", task, *common))
    long_range_arena.main(flags(folder, tmp_path / "cut", task, *common, "--max_steps", "2"))
    again = long_range_arena.main(flags(folder, tmp_path / "cut", task, *common))
    assert again["log"][-1]["step"] == 4
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_two_processes(folder: Path, tmp_path: Path) -> None:
    common = ["--attention", "eva", "--learning_rate", "0"]
    two_processes(RECIPE, flags(folder, tmp_path / "two", "matching", *common), folder / "home")
    long_range_arena.main(flags(folder, tmp_path / "one", "matching", *common))
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("eval_accuracy", "eval_loss"):
        assert two["metrics"]["eval"][name] == pytest.approx(one["metrics"]["eval"][name], rel=1e-6)


@pytest.mark.hub
def test_pushed_and_loaded(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.append('recipes'); from lra.model import BertForLongRangeArena\n"
        "model = BertForLongRangeArena.from_pretrained('local/it')\n"
        "assert model.config.linear_attention['kind'] == 'eva', model.config\n"
    )
    files, card = pushed(
        RECIPE, flags(folder, tmp_path / "out", "listops", "--attention", "eva"), folder / "home", code
    )
    assert {"README.md", "config.json", "model.safetensors"} <= files
    assert not any("optimizer" in name or "training_args" in name for name in files)
    assert "| accuracy |" in card


# -- published files --------------------------------------------------------------------------------------------------
def read(folder: Path, task: str, *changes: str, split: str = "validation") -> list[tuple[list[list[int]], int]]:
    argv = ["--task", task, "--output_dir", str(folder / "out"), "--hidden_size", "16", *changes]
    found = long_range_arena.prepare(
        read_flags(ArenaDataArguments, argv, None, model_class=long_range_arena.ArenaArguments)
    )
    return [(row["input_ids"], row["label"]) for row in found.data[split]]


def test_published_listops(tmp_path: Path) -> None:
    (tmp_path / "basic_val.tsv").write_text("Source\tTarget\n( ( ( [MAX 2 ) 9 ) ] )\t9\n7\t7\n")
    rows = read(tmp_path, "listops", "--do_eval", "--validation_file", str(tmp_path / "basic_val.tsv"))
    assert rows == [([[3, 9, 16, 6]], 9), ([[14]], 7)]


def test_published_pairs(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text('1.0\t7\t8\ta "b\tcd\n0.0\t7\t9\tx\t"y\n')
    rows = read(tmp_path, "matching", "--do_eval", "--validation_file", str(tmp_path / "pairs.tsv"))
    assert rows == [([[98, 33, 35, 99], [100, 101]], 1), ([[121], [35, 122]], 0)]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as Pathfinder is published: image i is of level i, its label is i % 2, and one image is empty."""
    for part, indices in (("0", range(10)), ("10", range(10, 21))):
        (tmp_path / "imgs" / part).mkdir(parents=True)
        (tmp_path / "metadata").mkdir(exist_ok=True)
        lines = []
        for index in indices:
            name = f"sample_{index}.png"
            Image.new("L", (32, 32), index).save(tmp_path / "imgs" / part / name)
            lines.append(f"imgs/{part} {name} {index} {index % 2} 1.0 14 4 2 0.5 1 1")
        (tmp_path / "metadata" / f"{part}.npy").write_text("\n".join(lines) + "\n")
    (tmp_path / "imgs" / "10" / "sample_20.png").write_bytes(b"")
    return tmp_path


def test_published_pathfinder(published: Path) -> None:
    common = ("--data_dir", str(published), "--do_train", "--do_eval", "--do_predict")
    rows = {s: read(published, "pathfinder", *common, split=s) for s in ("train", "validation", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 16, "validation": 2, "test": 2}
    everything = [row for found in rows.values() for row in found]
    assert all(label == (ids[0][0] - 1) % 2 for ids, label in everything)
    assert sorted(ids[0][0] - 1 for ids, _ in everything) == list(range(20))
    assert read(published, "pathfinder", *common, split="train") == rows["train"]
    assert read(published, "pathfinder", *common, "--split_seed", "1", split="train") != rows["train"]


def test_validation_rows_out_of_training_rows(folder: Path) -> None:
    common = ["--train_file", str(folder / "listops.parquet"), "--do_train"]
    whole = read(folder, "listops", *common, split="train")
    common += ["--do_eval", "--train_val_split", "0.25"]
    assert read(folder, "listops", *common, split="train") + read(folder, "listops", *common) == whole
    assert len(read(folder, "listops", *common)) == 3


# -- settings and mistakes --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_are_flags_of_the_recipe(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments._validate_args", lambda self: None, raising=False)
    argv = ["--config", str(path), "--output_dir", str(tmp_path)]
    found = read_flags(ArenaDataArguments, argv, None, model_class=long_range_arena.ArenaArguments)
    assert found.model.task == path.stem.removesuffix("_small")
    assert found.training.weight_decay == 0.0
    assert found.training.max_steps > 0
    if not path.stem.endswith("_small"):  # the published protocol
        assert found.training.learning_rate == 1e-4
        assert (found.data.max_length, found.model.hidden_size, found.model.num_hidden_layers) == (None, 64, 2)


def test_every_task_has_settings() -> None:
    assert {path.stem for path in CONFIGS} == {f"{task}{size}" for task in TASKS for size in ("", "_small")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--task", "images"], "argument --task: invalid choice: 'images'"),
        (["--hidden_size", "17"], "--hidden_size must be a multiple of --num_attention_heads; got 17 and 2"),
        (["--num_hidden_layers", "0"], "--num_hidden_layers must be at least 1; got 0"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1; got 1.0"),
        (["--max_length", "0"], "--max_length must be at least 1; got 0"),
        (["--train_val_split", "2"], "--train_val_split must be above 0 and below 1; got 2.0"),
        (["--train_val_split", "0.5"], "--train_val_split takes stored training data, and no validation data beside"),
        (["--data_dir", "elsewhere"], "Give --data_dir, or --dataset_name, or files"),
        (["--attention", "favour_plus"], "Did you mean 'favor_plus'?"),
        (["--label_column", "value"], "--label_column 'value' is not a column of the data"),
        (["--input_column", "target"], "Column 'target' must hold texts"),
        (["--layers", "5"], "layers"),
        (["--do_predict"], "needs test data"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, changes: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    attention = [] if "--attention" in changes else ["--attention", "eva"]
    argv = flags(folder, tmp_path / "out", "listops", *attention, *changes)
    monkeypatch.setattr(sys, "argv", ["long_range_arena.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run_program(long_range_arena.main)
    assert stop.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must hold metadata/*.npy"),
        ("imgs/0 sample_0.png 0", "must hold lines 'folder file number label'; got 'imgs/0 sample_0.png 0'"),
        ("imgs/0 sample_0.png 0 2", "must hold lines 'folder file number label'"),
        ("imgs/0 sample_0.png 0 1", "names imgs/0/sample_0.png, which is not there"),
    ],
)
def test_folders_that_are_no_pathfinder(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metadata").mkdir()
        (tmp_path / "metadata" / "0.npy").write_text(content + "\n")
    with pytest.raises(RecipeError) as raised:
        read(tmp_path, "pathfinder", "--do_eval", "--data_dir", str(tmp_path))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["listops", "--rows", "0", "--output", "x.parquet"], "--rows must be at least 1; got 0"),
        (["listops", "--rows", "1", "--output", "x.csv"], "--output must be a .parquet file; got 'x.csv'"),
        (["matching", "--rows", "1", "--output", "x.parquet", "--sources", "a.txt"], "--sources_file must be one of"),
    ],
)
def test_what_cannot_be_generated(arguments: Sequence[str], message: str) -> None:
    with pytest.raises((RecipeError, InputError)) as raised:
        build_long_range_arena.main(arguments)
    assert message in str(raised.value)


def test_short_expressions_first(folder: Path, tmp_path: Path) -> None:
    generate("listops", tmp_path / "sorted.parquet", "--min_length", "20", "--max_length", "60", "--short_first")
    first, plain = (
        pq.read_table(path)["source"].to_pylist() for path in (tmp_path / "sorted.parquet", folder / "listops.parquet")
    )
    assert sorted(first) == sorted(plain) != first
    lengths = [len(source.split()) for source in first]
    assert lengths == sorted(lengths)


def test_the_same_images_on_several_processes(folder: Path, tmp_path: Path) -> None:
    generate("pathfinder", tmp_path / "two.parquet", "--contour_length", "4", "--processes", "2")
    assert pq.read_table(tmp_path / "two.parquet") == pq.read_table(folder / "pathfinder.parquet")


def test_scores_are_those_of_all_rows() -> None:
    class Prediction:
        predictions = np.eye(10)[[1, 2, 3, 3]]
        label_ids = np.array([1, 2, 3, 4])

    labels = Labels("target", {i: i for i in range(10)}, [str(i) for i in range(10)])
    found = score(Prediction(), labels, CLASSIFICATION)
    assert found.metrics["accuracy"] == found.rows.mean() == 0.75
