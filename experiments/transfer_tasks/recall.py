"""Recall of pairs named once, further back than the window. Needs --model, a model of `teachers/recall.py`."""

from __future__ import annotations

import sys
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

ROWS = 16  # of a batch


class Task(BaseTask):
    """Windows of 16 tokens, at most 64 slots."""

    few_rows, rows = 64, 256

    def __init__(self, files: Files) -> None:
        if files.model is None:
            sys.exit("error: the task 'recall' needs --model, which experiments/teachers/recall.py trains.")
        self.model = shared.decoder(files.model, recall.LENGTH)
        self.about = (
            f"share of {self.rows * recall.ASKED} questions answered right (few: {self.few_rows * recall.ASKED});"
            " cached: token by token through a cache, with the largest difference of a logit to the parallel form"
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
        """Rows that ask in the gap too: other tokens have little to look for far away."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield recall.inputs(recall.sample(ROWS, generator, ask_in_gap=True)["input_ids"])

    def labelled_batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        return recall.batches(ROWS, seed)

    def score(self, model: Any, few: bool = False) -> dict[str, float]:
        rows = recall.test_rows(self.few_rows if few else self.rows)
        score = {"recall": recall.recall(model, rows)}
        return score if few else {**score, **cached(model, rows)}


@torch.inference_mode()
def cached(model: Any, rows: Tensor) -> dict[str, float]:
    """Recall of a model that reads one token after the other, and how far its logits are from the parallel form's."""
    found, difference = [], 0.0
    for part in rows.split(256):
        words = recall.inputs(part)
        given = {cache_argument(model): DynamicCache(config=model.config)}
        steps = [{name: ids[:, t : t + 1] for name, ids in words.items()} for t in range(part.shape[1])]
        logits = torch.cat([model(**step, use_cache=True, **given).logits for step in steps], 1)
        found.append(recall.answers(logits, part))
        difference = max(difference, float((logits - model(**words, use_cache=False).logits).abs().max()))
    return {"cached": float(torch.cat(found).float().mean()), "largest difference of a logit": difference}
