"""Embeddings of passages of 512 tokens. Needs --train and --test texts; --model is MiniLM-L6 unless said otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import shared
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_linattn import EvaConfig, FavorPlusConfig, FavorSharpConfig, LaraConfig
from hf_linattn.modules.config import AttentionConfig

from . import BaseTask, Files

ROWS = 4  # of a batch
NEAREST = 10


class Task(BaseTask):
    """Mean-pooled, normalised embeddings; windows of 32 tokens (the default), at most 64 slots."""

    length, few_passages, passages = 512, 60, 300

    def __init__(self, files: Files) -> None:
        self.model, self.tokenizer = shared.encoder(files.model)
        self.ids = shared.read_tokens(self.tokenizer, files.train, files.train_rows)
        each = self.passages // len(files.test)
        texts = [shared.read_tokens(self.tokenizer, [path]) for path in files.test]
        rows = [shared.rows_of(ids, self.length - 2, each) for ids in texts]
        # One of each text in turn, so that the first passages are as mixed as all.
        self.rows = shared.with_ends(self.tokenizer, torch.stack(rows, dim=1).flatten(0, 1))
        self.about = (
            f"mean cosine to softmax's embeddings of {len(self.rows)} passages of {self.length} tokens, and how many"
            f" of a passage's {NEAREST} nearest are still among them (few: {self.few_passages} passages)"
        )

    def settings(self) -> dict[str, AttentionConfig]:
        lara = LaraConfig(learned=True, num_landmarks=64)
        exact: dict[str, Any] = {"overlap_window": True, "num_heavy_keys": 64}
        return {
            "favor_plus-256-random": FavorPlusConfig(),
            "favor_plus-32": FavorPlusConfig(learned=True),  # the preset
            "favor_plus-64": FavorPlusConfig(learned=True, num_features=64),
            "favor_sharp-64": FavorSharpConfig(learned=True, num_features=64),
            "lara-64": lara,
            "eva-64": EvaConfig(learned=True, num_chunks=64),
            "lara-64-overlap-heavy": lara.replace(**exact),
            "lara-64-overlap-heavy-128": lara.replace(**exact | {"num_heavy_keys": 128}),
            "lara-64-overlap-heavy-256": lara.replace(**exact | {"num_heavy_keys": 256}),
        }

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Random pieces of the training text."""
        generator = torch.Generator().manual_seed(seed)
        length = self.length - 2
        while True:
            starts = torch.randint(len(self.ids) - length, (ROWS,), generator=generator)
            pieces = torch.stack([self.ids[start : start + length] for start in starts])
            yield {"input_ids": shared.with_ends(self.tokenizer, pieces)}

    def score(self, model: Any, few: bool = False) -> dict[str, float]:
        count = self.few_passages if few else len(self.rows)
        target = self._targets[:count]
        found = target if model is self.model else _embeddings(model, self.rows[:count])
        kept = (_nearest(target)[:, :, None] == _nearest(found)[:, None]).sum((1, 2)).double()
        return {"cosine": float((target * found).sum(-1).mean()), "nearest kept": float(kept.mean())}

    @cached_property
    def _targets(self) -> Tensor:
        return _embeddings(self.model, self.rows)


@torch.inference_mode()
def _embeddings(model: Any, rows: Tensor) -> Tensor:
    parts = [model(part).last_hidden_state.mean(1) for part in rows.split(ROWS)]
    return normalize(torch.cat(parts).double(), dim=-1)


def _nearest(embeddings: Tensor) -> Tensor:
    """The passages nearest to each, without itself: `[passages, NEAREST]`."""
    similarity = embeddings @ embeddings.mT
    return similarity.fill_diagonal_(-1).topk(NEAREST).indices
