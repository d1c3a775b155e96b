"""Perplexity of a GPT-2 on text that it has not seen. Needs --model, --train, --test (text or parquet files)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import shared
import torch
from torch import Tensor
from transformers import AutoTokenizer

from hf_linattn import EvaConfig, FavorPlusConfig, FavorSharpConfig, LaraConfig
from hf_linattn.modules.config import AttentionConfig

from . import BaseTask, Files

ROWS = 4  # of a batch


class Task(BaseTask):
    """Rows of 512 tokens; windows of 32 tokens (the default), at most 64 slots."""

    length, few_windows, windows = 512, 32, 256

    def __init__(self, files: Files) -> None:
        if not (files.model and files.train and files.test):
            sys.exit("error: the task 'gpt2' needs --model, --train and --test.")
        self.model = shared.decoder(files.model, self.length)
        tokenizer = AutoTokenizer.from_pretrained(files.model)
        self.ids = shared.read_tokens(tokenizer, files.train, files.train_rows)
        self.rows = shared.rows_of(shared.read_tokens(tokenizer, files.test), self.length, self.windows)
        self.about = (
            f"perplexity on the first {len(self.rows)} windows of {self.length} tokens of the test text"
            f" (few: the first {min(self.few_windows, len(self.rows))})"
        )

    def settings(self) -> dict[str, AttentionConfig]:
        return {
            "favor_plus-256-random": FavorPlusConfig(),
            "favor_plus-16": FavorPlusConfig(learned=True, num_features=16),
            "favor_plus-64": FavorPlusConfig(learned=True, num_features=64),
            "favor_sharp-16": FavorSharpConfig(learned=True, num_features=16),
            "favor_sharp-64": FavorSharpConfig(learned=True, num_features=64),
            "lara-16": LaraConfig(learned=True, num_landmarks=16),
            "lara-64": LaraConfig(learned=True, num_landmarks=64),
            "eva-chunk16": EvaConfig(learned=True, chunk_size=16),  # 30 chunks beside the last window
            "eva-chunk8": EvaConfig(learned=True, chunk_size=8),
        }

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Random pieces of the training text."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.ids) - self.length, (ROWS,), generator=generator)
            yield {"input_ids": torch.stack([self.ids[start : start + self.length] for start in starts])}

    def score(self, model: Any, few: bool = False) -> dict[str, float]:
        return {"perplexity": perplexity(model, self.rows[: self.few_windows] if few else self.rows)}


def perplexity(model: Any, rows: Tensor) -> float:
    """Of rows `[rows, tokens]`, each read on its own."""
    with torch.inference_mode():
        losses = [float(model(part, labels=part).loss) * len(part) for part in rows.split(ROWS)]
    return math.exp(sum(losses) / len(rows))
