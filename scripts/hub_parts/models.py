"""The models that the Hub is checked with, and inputs for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

SENTENCES = Path(__file__).resolve().parents[2] / "recipes" / "data" / "sst2_sample" / "train.parquet"
TOKENS = 256  # of a text: several windows, so that most of a token's keys are far away
MASKED = 0.15

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class HubModel:
    """A repository on the Hub and how to use it.

    Args:
        auto: The Auto class, which finds the stock class and, for what was pushed, ours.
        processor: Class of the tokenizer or image processor. Not AutoImageProcessor, which does not know the names
            that old files give to it.
        megabytes: Of its weights, to say in advance what will be transferred.
        unused: Tensors of the file that the head has no place for.
        read: Processor, number of rows and seed -> rows, with labels.
    """

    name: str
    repo: str
    auto: str
    processor: str
    megabytes: int
    unused: str
    read: Callable[[Any, int, int], Batch]
    is_causal: bool = False

    def batches(self, processor: Any, count: int, seed: int = 0, size: int = 4) -> list[Batch]:
        """Labelled batches of `size` rows."""
        rows = self.read(processor, count * size, seed)
        return [{name: tensor[i : i + size] for name, tensor in rows.items()} for i in range(0, count * size, size)]

    def is_unused(self, tensor: str) -> bool:
        return re.search(self.unused, tensor) is not None


def sentences() -> list[str]:
    return pq.read_table(SENTENCES)["sentence"].to_pylist()


def _masked_texts(tokenizer: Any, rows: int, seed: int) -> Batch:
    """Texts of several sentences, three lengths of them, padded; labels are the tokens behind the masks."""
    chosen = np.random.default_rng(seed).permutation(sentences())
    longest = min(TOKENS, tokenizer.model_max_length)
    encoded = []
    for row in range(rows):
        text = " ".join(np.take(chosen, range(24 * row, 24 * (row + 1)), mode="wrap"))
        encoded.append(tokenizer(text, truncation=True, max_length=longest - longest // 4 * (row % 3)))
    batch = dict(tokenizer.pad(encoded, padding="max_length", max_length=longest, return_tensors="pt"))
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    masked = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < MASKED) & ~special
    batch["labels"] = ids.masked_fill(~masked, -100)
    batch["input_ids"] = ids.masked_fill(masked, tokenizer.mask_token_id)
    return batch


def _texts(tokenizer: Any, rows: int, seed: int) -> Batch:
    """One text cut into rows of equal length."""
    chosen = np.random.default_rng(seed).permutation(sentences())
    length = min(TOKENS, tokenizer.model_max_length)
    ids = [token for ids in tokenizer(list(chosen), verbose=False)["input_ids"] for token in ids]
    rows_of_ids = torch.tensor(np.take(ids, range(rows * length), mode="wrap")).view(rows, length)
    return {"input_ids": rows_of_ids, "labels": rows_of_ids.clone()}


def _images(processor: Any, rows: int, seed: int) -> Batch:
    """Coarse colour patterns of four sorts."""
    draw = np.random.default_rng(seed)
    labels = np.arange(rows) % 4
    images = []
    for label in labels:
        coarse = draw.integers(0, 128, (8, 8, 3))
        coarse[:4] += 120 * (label % 2)
        coarse[:, :4] += 120 * (label // 2)
        images.append(np.kron(coarse.clip(0, 255), np.ones((40, 40, 1))).astype(np.uint8))
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor(labels)}


MODELS: Mapping[str, HubModel] = {
    model.name: model
    for model in (
        HubModel(
            "bert",
            "google-bert/bert-base-uncased",
            "AutoModelForMaskedLM",
            "AutoTokenizer",
            440,
            r"^cls\.seq_relationship\.|^bert\.pooler\.|position_ids$",
            _masked_texts,
        ),
        HubModel(
            "gpt2",
            "openai-community/gpt2",
            "AutoModelForCausalLM",
            "AutoTokenizer",
            548,
            r"\.attn\.(masked_)?bias$",
            _texts,
            is_causal=True,
        ),
        HubModel(
            "vit",
            "google/vit-base-patch16-224",
            "AutoModelForImageClassification",
            "ViTImageProcessor",
            346,
            r"\.pooler\.",
            _images,
        ),
    )
}
