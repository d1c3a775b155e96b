"""The image classification recipe on tiny models: what it reads, trains and measures, and how it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_runs import SCRATCH, SIZE, arguments, build_images, evaluated, picture, run, without, write
from recipe_runs import assert_same_weights, pushed, train, two_processes, weights
from safetensors.torch import load_file
from tiny_checkpoints import IMAGE_LABELS, encoded
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    ViTForImageClassification,
)

import evaluate_checkpoint
import image_classification
from parts.images import ImageColumns, load_image_processor
from parts.labels import Labels
from parts.pixels import PixelCollator, PixelReader
from parts.training import ModelArguments

RECIPE = "recipes/image_classification.py"
VARIED = ["--crop_padding", "2", "--random_erasing", "0.5", "--mixup_alpha", "0.8", "--cutmix_alpha", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_images(tmp_path_factory.mktemp("images"))


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


def test_a_checkpoint_predicts_for_images_alone(folder: Path, tmp_path: Path) -> None:
    run(arguments(folder, tmp_path / "run", "eva", "--max_steps", "1"))
    pq.write_table(pa.table({"img": [encoded(picture(i)) for i in range(3)]}), tmp_path / "images.parquet")
    argv = ["--model_name_or_path", str(tmp_path / "run"), "--test_file", str(tmp_path / "images.parquet")]
    run([*argv, "--do_predict", "--output_dir", str(tmp_path / "out"), "--report_to", "none"])
    lines = (tmp_path / "out" / "predictions.tsv").read_text().splitlines()
    assert len(lines) == 4
    assert {line.split("\t")[1] for line in lines[1:]} <= {str(i) for i in range(IMAGE_LABELS)}


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


def test_the_pretrained_weights_are_used(folder: Path, tmp_path: Path) -> None:
    run(arguments(folder, tmp_path, "softmax", "--max_steps", "1", "--learning_rate", "0"))
    before, after = load_file(folder / "vit" / "model.safetensors"), weights(tmp_path)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "classifier" not in name)
