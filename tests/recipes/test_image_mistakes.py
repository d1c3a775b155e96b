"""Image classification: a mistake is one line, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from image_runs import SCRATCH, arguments, build_images, picture, without, write
from PIL import Image
from recipe_runs import assert_mistake
from tiny_checkpoints import encoded

import image_classification


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_images(tmp_path_factory.mktemp("images"))


def broken(path: Path) -> list[str]:
    good = encoded(picture(0))
    bad = {"bytes": good["bytes"][:200], "path": "holiday.png"}
    return ["--train_file", str(write(path / "data.parquet", [good, good, bad, good], [0, 1, 0, 1]))]


def of_mode(mode: str, form: str) -> Callable[[Path], list[str]]:
    def flags(path: Path) -> list[str]:
        values = np.full((30, 26), 40000, dtype=np.uint16)
        strange = Image.fromarray(values) if mode == "I;16" else picture(1).convert(mode)
        images = [encoded(picture(0)), encoded(strange, form)]
        return ["--train_file", str(write(path / "data.parquet", images, [0, 1]))]

    return flags


def missing_image(path: Path) -> list[str]:
    return ["--train_file", str(write(path / "data.parquet", [encoded(picture(0)), None], [0, 1]))]


def missing_label(path: Path) -> list[str]:
    return ["--train_file", str(write(path / "data.parquet", [encoded(picture(i)) for i in range(3)], [0, None, 1]))]


def missing_named_label(path: Path) -> list[str]:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"img": [encoded(picture(i)) for i in range(3)], "label": [0, None, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path / "data.parquet")
    return ["--train_file", str(path / "data.parquet")]


def no_rows(path: Path) -> list[str]:
    table = pq.read_table(write(path / "data.parquet", [encoded(picture(0))], [0]))
    pq.write_table(table.slice(0, 0), path / "empty.parquet")
    return ["--train_file", str(path / "empty.parquet")]


def numbers(path: Path) -> list[str]:
    return ["--train_file", str(write(path / "data.parquet", [encoded(picture(0))] * 2, [0.5, 1.5]))]


def strange_folder(path: Path) -> list[str]:
    for split, name in (("train", "ant"), ("train", "bee"), ("dev", "wasp")):
        (path / split / name).mkdir(parents=True)
        picture(0).save(path / split / name / "0.png")
    return ["--train_dir", str(path / "train"), "--validation_dir", str(path / "dev")]


def flat_folder(path: Path) -> list[str]:
    return ["--train_dir", str(path.parent / "images")]


def yaml_key(path: Path) -> list[str]:
    (path / "run.yaml").write_text("mixup: 0.8\n")
    return ["--config", str(path / "run.yaml")]


MISTAKES: list[tuple[Any, str]] = [
    (["--image_column", "photo"], "--image_column 'photo' is not a column of the data; columns: ['img', 'label']"),
    (["--label_column", "kind"], "--label_column 'kind' is not a column of the data"),
    (["--image_column", "label", "--label_column", "img"], "Column 'label' does not hold images"),
    (["--image_size", "30"], "image_size must be a multiple of the patch size, 4 x 4 pixels; got (30, 30)"),
    (["--image_size", "wide"], "--image_size must look like '384' or '384x512'"),
    (["--convert_modes", "I;16"], "--convert_modes must be of CMYK"),
    (["--train_dir", "nowhere"], "Give folders of images, files or --dataset_name, not several"),
    (["--mixup_alhpa", "0.8"], "'--mixup_alhpa' is not a flag of this recipe. Did you mean '--mixup_alpha'?"),
    (["--model_type", "vit"], "got --model_name_or_path and --model_type"),
    (["--config_overrides", "patch_size=2"], "--config_overrides is for a model from scratch"),
    (["--mixup_alpha", "-1"], "--mixup_alpha must not be negative"),
    (["--train_file", "images.csv"], "--train_file must be one of ['.parquet']"),
    (broken, "Row 2 of the train data (holiday.png) cannot be read as an image"),
    (of_mode("CMYK", "TIFF"), "Row 1 of the train data is an image of mode 'CMYK'"),
    (of_mode("I;16", "PNG"), "Row 1 of the train data is an image of mode 'I;16'"),
    (of_mode("F", "TIFF"), "Row 1 of the train data is an image of mode 'F'"),
    (missing_image, "Row 1 of the train data has no image"),
    (missing_label, "got None"),
    (missing_named_label, "got None"),
    (no_rows, "has no rows."),
    (numbers, "must hold class labels"),
    (yaml_key, "'mixup' is not a flag of this recipe"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_mistakes_get_one_line(
    folder: Path, tmp_path: Path, changes: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = changes(tmp_path) if callable(changes) else changes
    argv = arguments(folder, tmp_path / "out", "eva", *flags)
    assert_mistake(image_classification.main, argv, message, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (strange_folder, "--validation_dir has a folder 'wasp', which --train_dir does not have."),
        (flat_folder, "--train_dir must hold a folder of images for each label, at least two"),
        (lambda path: ["--train_dir", "nowhere"], "--train_dir must be a folder of images; 'nowhere' is none."),
    ],
)
def test_mistakes_of_folders(
    folder: Path, tmp_path: Path, changes: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder / f"mistake-{tmp_path.name}"
    place.mkdir()
    argv = without(arguments(folder, tmp_path / "out", "eva", *changes(place)), "train_file", "validation_file")
    assert_mistake(image_classification.main, argv, message, tmp_path / "out", capsys)


def test_models_of_other_families(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(folder, tmp_path / "out", "softmax", "--model_name_or_path", str(folder / "bert-mlm"))
    assert_mistake(
        image_classification.main, argv, "cannot be loaded: Unrecognized configuration", tmp_path / "out", capsys
    )
    scratch = ["--model_type", "deit", "--config_overrides", SCRATCH]
    argv = without(arguments(folder, tmp_path / "out", "eva", *scratch), "model_name_or_path")
    assert_mistake(image_classification.main, argv, "got model_type 'deit'", tmp_path / "out", capsys)
    argv = without(arguments(folder, tmp_path / "out", "eva", "--model_type", "vti"), "model_name_or_path")
    assert_mistake(image_classification.main, argv, "Did you mean 'vit'?", tmp_path / "out", capsys)
    argv = without(arguments(folder, tmp_path / "out", "eva"), "model_name_or_path")
    assert_mistake(image_classification.main, argv, "Give one of --model_name_or_path", tmp_path / "out", capsys)
    wrong = ["--model_type", "vit", "--config_overrides", "width=3"]
    argv = without(arguments(folder, tmp_path / "out", "eva", *wrong), "model_name_or_path")
    assert_mistake(image_classification.main, argv, "must be fields of ViTConfig", tmp_path / "out", capsys)
