"""What the tests of image classification share: pictures, data, command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tiny_checkpoints import build, encoded

import image_classification

SIZE = 24
SCRATCH = "hidden_size=32,num_attention_heads=2,num_hidden_layers=1,intermediate_size=32,image_size=24,patch_size=4"


def build_images(path: Path) -> Path:
    """Tiny checkpoints and data, and folders of pictures."""
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
