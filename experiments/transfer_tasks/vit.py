"""Accuracy of a ViT. Needs --model, --train, --test: parquet files with columns `image` and `label`, as CIFAR-10's."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import shared
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_linattn import EvaConfig, FavorPlusConfig, FavorSharpConfig, LaraConfig
from hf_linattn.modules.config import AttentionConfig

from . import BaseTask, Files

ROWS = 16  # of a batch


class Task(BaseTask):
    """Windows of 4 x 4 patches, [CLS] exact (the defaults), at most 64 slots."""

    few_images, train_images = 1000, 8000

    def __init__(self, files: Files) -> None:
        shared.quiet()
        self.model = AutoModelForImageClassification.from_pretrained(files.model, dtype=torch.float32).eval()
        processor = AutoImageProcessor.from_pretrained(files.model)
        self.train_pixels, _ = _read(files.train, processor, files.train_rows or self.train_images)
        self.pixels, self.labels = _read(files.test, processor)
        self.about = f"accuracy in percent on {len(self.labels)} images (few: the first {self.few_images})"

    def settings(self) -> dict[str, AttentionConfig]:
        return {
            "favor_plus-256-random": FavorPlusConfig(),
            "favor_plus-64": FavorPlusConfig(learned=True, num_features=64),
            "favor_sharp-64": FavorSharpConfig(learned=True, num_features=64),
            "lara-64": LaraConfig(learned=True, num_landmarks=64),
            "eva-64": EvaConfig(learned=True, num_chunks=64),  # 2 x 2 patches each
        }

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(self.train_pixels), (ROWS,), generator=generator)
            yield {"pixel_values": self.train_pixels[chosen]}

    @torch.inference_mode()
    def score(self, model: Any, few: bool = False) -> dict[str, float]:
        count = self.few_images if few else len(self.labels)
        parts = [model(pixel_values=part).logits.argmax(-1) for part in self.pixels[:count].split(2 * ROWS)]
        return {"accuracy": 100 * float((torch.cat(parts) == self.labels[:count]).double().mean())}


def _read(paths: Iterable[Path], processor: Any, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels `[images, channels, height, width]` as the model takes them, and labels `[images]`."""
    table = pyarrow.concat_tables([pyarrow.parquet.read_table(path, columns=["image", "label"]) for path in paths])
    table = table.slice(0, most)
    pictures = [Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in table["image"].to_pylist()]
    return processor(pictures, return_tensors="pt")["pixel_values"], torch.tensor(table["label"].to_pylist())
