"""The image classification recipe on tiny models: what it reads, trains and measures, and how it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from recipe_runs import assert_mistake, assert_same_weights, pushed, train, two_processes, weights
from safetensors.torch import load_file
from tiny_checkpoints import IMAGE_LABELS, build, encoded
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    ViTForImageClassification,
)

import evaluate_checkpoint
import image_classification
from _images import ImageColumns, load_image_processor
from _labels import Labels
from _pixels import PixelCollator, PixelReader
from _training import ModelArguments

RECIPE = "recipes/image_classification.py"
SIZE = 24
SCRATCH = "hidden_size=32,num_attention_heads=2,num_hidden_layers=1,intermediate_size=32,image_size=24,patch_size=4"
VARIED = ["--crop_padding", "2", "--random_erasing", "0.5", "--mixup_alpha", "0.8", "--cutmix_alpha", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    build(path)
    for split, count in (("train", 4), ("dev", 2)):
        for number, name in enumerate(("ant", "bee", "cat")):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                picture(number * 100 + i).save(path / split / name / f"{i}.png")
    return path


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (30, 26, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def arguments(folder: Path, output: Path, kind: str = "eva", *changes: str) -> list[str]:
    """The command line of two epochs of three steps, saved after every step, on 12 rows."""
    values: dict[str, Any] = {
        "model_name_or_path": folder / "vit",
        "attention": kind,
        "train_file": folder / "images.parquet",
        "validation_file": folder / "images.parquet",
        "max_train_samples": 12,
        "max_eval_samples": 18,
        "output_dir": output,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "save_steps": 1,
        "eval_strategy": "epoch",
        "learning_rate": 1e-2,
        "disable_tqdm": "true",
        "report_to": "none",
    }
    if kind not in ("softmax", "keep"):
        values["window_size"] = 2
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [*flags, "--do_train", "--do_eval", *changes]


def without(argv: list[str], *names: str) -> list[str]:
    for name in names:
        del argv[argv.index(f"--{name}") : argv.index(f"--{name}") + 2]
    return argv


def run(argv: list[str]) -> dict[str, Any]:
    return image_classification.main(argv, quiet=True)


def evaluated(folder: Path, output: Path, *changes: str) -> dict[str, Any]:
    """What a run that trains nothing says of the model; its head has two labels."""
    two = folder / "two.parquet"
    if not two.exists():
        write(two, [encoded(picture(i)) for i in range(6)], [0, 1] * 3)
    changes = ("--validation_file", str(two), *changes)
    argv = arguments(folder, output, "keep", "--max_steps", "1", "--learning_rate", "0", *changes)
    argv.remove("--do_train")
    return run(argv)


def write(path: Path, images: list[Any], labels: list[Any]) -> Path:
    pq.write_table(pa.table({"img": images, "label": labels}), path)
    return path


# -- training, resuming, sharing --------------------------------------------------------------------------------------
TRANSFER = ["--transfer_steps", "2"]
LORA = ["--lora_target_modules", "q_proj,v_proj"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("eva", [*VARIED, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]),
        ("lara", [*TRANSFER, *LORA, "--label_smoothing_factor", "0.1"]),
    ],
    ids=["augmentation", "transfer and LoRA"],
)
def test_a_run_that_was_cut_ends_with_the_same_weights(
    folder: Path, tmp_path: Path, kind: str, changes: list[str]
) -> None:
    whole = train(arguments(folder, tmp_path / "whole", kind, *changes), main=image_classification.main)
    argv = arguments(folder, tmp_path / "cut", kind, *changes)
    train(argv, cut_after=5, main=image_classification.main)
    after = train(argv, main=image_classification.main)
    assert np.array_equal(after.seen, whole.seen[-8:])  # steps 5 and 6
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    if VARIED[0] in changes:
        assert not np.array_equal(whole.seen[:12], whole.seen[12:])
        assert len({str(image) for image in whole.seen}) == 24  # no image twice


def test_two_processes_have_the_metric_of_one(folder: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("one", "two"):
        argv = arguments(folder, tmp_path / name, "eva", "--learning_rate", "0", "--max_steps", "1", *VARIED)
        argv += ["--per_device_eval_batch_size", "4"]  # 18 rows: the last batch of a process has fewer
        if name == "one":
            run(argv)
        else:
            two_processes(RECIPE, argv, folder / "home")
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert [found[name]["processes"] for name in ("one", "two")] == [1, 2]
    one, two = (found[name]["metrics"]["eval"] for name in ("one", "two"))
    for metric in ("eval_accuracy", "eval_top5_accuracy"):
        assert one[metric] == two[metric]
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)  # rows that fill up a batch do not count


@pytest.mark.hub
def test_push_and_load_back(folder: Path, tmp_path: Path) -> None:
    code = (
        "import hf_linattn; from transformers import AutoImageProcessor, AutoModelForImageClassification\n"
        "model = AutoModelForImageClassification.from_pretrained('local/it')\n"
        "assert model.config.linear_attention['kind'] == 'favor_plus', model.config\n"
        "assert AutoImageProcessor.from_pretrained('local/it').size['height'] == 32\n"
    )
    argv = arguments(folder, tmp_path / "out", "favor_plus", "--max_steps", "1", "--image_size", "32")
    files, card = pushed(RECIPE, argv, folder / "home", code)
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert "| accuracy |" in card
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert (model.config.image_size, model.config.num_labels) == (32, IMAGE_LABELS)


# -- models -----------------------------------------------------------------------------------------------------------
def test_from_scratch(folder: Path, tmp_path: Path) -> None:
    argv = without(arguments(folder, tmp_path / "a", "favor_sharp"), "model_name_or_path")
    argv += ["--model_type", "vit", "--config_overrides", SCRATCH, "--max_steps", "2", "--learning_rate", "0"]
    found = run(argv)
    assert found["attention"]["kind"] == "favor_sharp"
    assert found["model"]["config_overrides"] == SCRATCH
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "a")
    assert (model.config.hidden_size, model.config.num_labels, len(model.base_model.layers)) == (32, IMAGE_LABELS, 1)
    assert AutoImageProcessor.from_pretrained(tmp_path / "a").size["height"] == SIZE
    # The weights follow from the seed.
    run([*argv, "--output_dir", str(tmp_path / "b")])
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    run([*argv, "--output_dir", str(tmp_path / "c"), "--seed", "1"])
    one, other = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_another_resolution_is_stored(folder: Path, tmp_path: Path) -> None:
    flags = ["--image_size", "32x40", "--max_steps", "1", "--learning_rate", "0"]
    assert run(arguments(folder, tmp_path, "softmax", *flags))["data"]["image_size"] == (32, 40)
    model, processor = (
        ViTForImageClassification.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    )
    pixels = processor([picture(0)], return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (32, 40)
    old = ViTForImageClassification.from_pretrained(
        folder / "vit", num_labels=IMAGE_LABELS, ignore_mismatched_sizes=True
    )
    old.classifier.load_state_dict(model.classifier.state_dict())
    with torch.no_grad():
        expected = old.eval()(pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(model.eval()(pixels).logits, expected)
    # Evaluated at the new size, without a flag, and by itself.
    again = evaluated(folder, tmp_path / "again", "--model_name_or_path", str(tmp_path))
    assert again["data"]["image_size"] == (32, 40)


def test_what_a_head_stands_for(folder: Path, tmp_path: Path) -> None:
    """By name where labels have names; labels with other names than the checkpoint's get a new head."""
    run(arguments(folder, tmp_path / "six", "softmax", "--max_steps", "1"))
    known = AutoModelForImageClassification.from_pretrained(tmp_path / "six").config
    assert known.label2id == {str(i): i for i in range(IMAGE_LABELS)}
    folders = ["--train_dir", str(folder / "train"), "--validation_dir", str(folder / "dev")]
    argv = arguments(folder, tmp_path / "three", "softmax", "--max_steps", "1", *folders)
    argv = without(argv, "train_file", "validation_file")
    found = run([*argv, "--model_name_or_path", str(tmp_path / "six")])
    assert found["data"]["labels"] == {"0": 0, "1": 1, "2": 2}
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "three").config.label2id == {
        "ant": 0,
        "bee": 1,
        "cat": 2,
    }
    # A split without some of the labels: its folders keep their names.
    shutil.copytree(folder / "dev", tmp_path / "dev")
    shutil.rmtree(tmp_path / "dev" / "ant")
    losses = []
    for path in (folder / "dev", tmp_path / "dev"):
        argv = [f"--validation_dir={path}", f"--train_dir={folder / 'train'}", "--do_predict", f"--test_dir={path}"]
        base = without(
            arguments(folder, tmp_path / f"eval-{path.parent.name}", "keep"), "train_file", "validation_file"
        )
        base.remove("--do_train")
        found = run([*base, *argv, "--model_name_or_path", str(tmp_path / "three")])
        losses.append(found["metrics"]["eval"]["eval_accuracy"])
        lines = (tmp_path / f"eval-{path.parent.name}" / "predictions.tsv").read_text().splitlines()
        assert {line.split("\t")[1] for line in lines[1:]} <= {"ant", "bee", "cat"}
    assert len(lines) == 5


# -- pixels -----------------------------------------------------------------------------------------------------------
def test_pixels_are_those_of_the_image_processor(folder: Path) -> None:
    model = ViTForImageClassification.from_pretrained(folder / "vit")
    processor = load_image_processor(ModelArguments(str(folder / "vit")), model)
    columns, labels = ImageColumns("image", "label"), Labels("label", {0: 0, 1: 1}, ["0", "1"])
    pictures = [picture(i) for i in range(3)]
    read = PixelReader(processor, "RGB", ["RGB"], labels, "train", columns.image, columns.label)
    rows = read({"image": [encoded(each) for each in pictures], "label": [0, 1, 1]}, [0, 1, 2])
    batch = PixelCollator.of(processor, model)(
        [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    )
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [0, 1, 1]


def test_pixels_may_be_stored_or_read_when_needed(folder: Path, tmp_path: Path) -> None:
    found = [evaluated(folder, tmp_path / str(stored), "--store_pixels", stored) for stored in ("true", "false")]
    assert found[0]["metrics"]["eval"]["eval_loss"] == found[1]["metrics"]["eval"]["eval_loss"]


def test_streamed_images(folder: Path, tmp_path: Path) -> None:
    argv = without(arguments(folder, tmp_path, "eva", "--max_steps", "4", "--streaming"), "num_train_epochs")
    found = run([*argv, "--eval_strategy", "no"])
    assert found["log"][-1]["step"] == 4


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_images_of_8_bits_are_converted(folder: Path, tmp_path: Path, mode: str) -> None:
    files = [
        write(tmp_path / f"{name}.parquet", [encoded(each) for each in pictures], [0, 1] * 3)
        for name, pictures in (
            ("as_it_is", [picture(i, mode) for i in range(6)]),
            ("converted", [picture(i, mode).convert("RGB") for i in range(6)]),
        )
    ]
    losses = [
        evaluated(folder, tmp_path / path.stem, "--validation_file", str(path))["metrics"]["eval"]["eval_loss"]
        for path in files
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_images_of_other_modes_are_converted_if_asked_for(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", [encoded(picture(i, "CMYK"), "TIFF") for i in range(4)], [0, 1] * 2)
    found = evaluated(folder, tmp_path, "--validation_file", str(path), "--convert_modes", "CMYK")
    assert 0 <= found["metrics"]["eval"]["eval_accuracy"] <= 1


# -- metrics ----------------------------------------------------------------------------------------------------------
def test_top5_and_rows() -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 0, 1], [0, 9, 8, 7, 6, 1, 2], [0, 9, 8, 7, 6, 5, 2]])
    best = image_classification.best_outputs(logits, 7)
    found = image_classification.score(EvalPrediction(best.numpy(), np.array([0, 2, 0])))
    assert found.metrics == {"accuracy": pytest.approx(1 / 3), "top5_accuracy": pytest.approx(2 / 3)}
    assert found.rows.tolist() == [1.0, 0.0, 0.0]
    few = image_classification.best_outputs(logits[:, :5], 5)
    assert few.shape == (3, 1)
    assert set(image_classification.score(EvalPrediction(few.numpy(), np.array([0, 1, 1]))).metrics) == {"accuracy"}


def test_evaluate_checkpoint(folder: Path, tmp_path: Path) -> None:
    trained = run(arguments(folder, tmp_path / "out", "lara", "--max_steps", "1"))
    argv = ["--model_name_or_path", str(tmp_path / "out"), "--validation_file", str(folder / "images.parquet")]
    argv += ["--max_eval_samples", "18", "--repeats", "1", "--timed_batches", "1"]
    found = evaluate_checkpoint.main(argv)
    assert found["checkpoint"]["accuracy"] == trained["metrics"]["eval"]["eval_accuracy"]
    assert found["checkpoint"]["rows"] == 18
    assert found["original"]["attention"] == "softmax"


# -- mistakes ---------------------------------------------------------------------------------------------------------
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


def test_the_pretrained_weights_are_used(folder: Path, tmp_path: Path) -> None:
    run(arguments(folder, tmp_path, "softmax", "--max_steps", "1", "--learning_rate", "0"))
    before, after = load_file(folder / "vit" / "model.safetensors"), weights(tmp_path)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "classifier" not in name)
