"""Recall of pairs named once, further back than the window. Needs --model, a model of `teachers/recall.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import shared
import torch
from teachers import recall
from torch import Tensor
from transformers import DynamicCache

from hf_linattn import EvaConfig, FavorPlusConfig, FavorSharpConfig, LaraConfig
from hf_linattn.integrations.seams import cache_argument
from hf_linattn.modules.config import AttentionConfig

from . import BaseTask, Files

ROWS = 32  # of a batch


class Task(BaseTask):
    """Windows of 16 tokens, at most 64 slots."""

    few_rows, rows = 128, 512

    def __init__(self, files: Files) -> None:
        self.model = shared.decoder(files.model, recall.LENGTH)
        self.about = (
            f"share of {self.rows * recall.ASKED} questions answered right (few: {self.few_rows * recall.ASKED});"
            " cached: the same rows read token by token through a cache"
        )

    def settings(self) -> dict[str, AttentionConfig]:
        window: dict[str, Any] = {"window_size": 16}
        learned = {**window, "learned": True}
        return {
            "favor_plus-64-random": FavorPlusConfig(num_features=64, **window),
            "favor_plus-256-random": FavorPlusConfig(num_features=256, **window),
            "favor_plus-16": FavorPlusConfig(num_features=16, **learned),
            "favor_plus-64": FavorPlusConfig(num_features=64, **learned),
            "favor_sharp-64": FavorSharpConfig(num_features=64, **learned),
            "lara-64": LaraConfig(num_landmarks=64, **learned),
            "eva-chunk4": EvaConfig(chunk_size=4, **learned),
            "eva-chunk2": EvaConfig(chunk_size=2, **learned),  # 64 chunks beside the last window
        }

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        for batch in self.labelled_batches(seed):
            yield recall.inputs(batch["input_ids"])

    def labelled_batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield recall.sample(ROWS, generator)

    def score(self, model: Any, few: bool = False) -> dict[str, float]:
        if few:
            return {"recall": recall.recall(model, recall.test_rows(self.few_rows))}
        rows = recall.test_rows(self.rows)
        return {"recall": recall.recall(model, rows), "cached": cached_recall(model, rows)}


@torch.inference_mode()
def cached_recall(model: Any, rows: Tensor) -> float:
    """The share of questions answered right by a model that reads one token after the other."""
    found = []
    for part in rows.split(128):
        given = {cache_argument(model): DynamicCache(config=model.config)}
        tokens = zip(*(z.split(1, dim=1) for z in recall.inputs(part).values()), strict=True)
        logits = [
            model(input_ids=token, token_type_ids=before, use_cache=True, **given).logits for token, before in tokens
        ]
        found.append(recall.answers(torch.cat(logits, 1), part))
    return float(torch.cat(found).float().mean())
