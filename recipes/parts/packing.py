"""Rows of whole texts, several in each, none of which sees another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DataCollatorWithFlattening, PreTrainedConfig

from .common import RecipeError
from .masking import IGNORED


def check_packing(config: PreTrainedConfig, objective: str) -> None:
    """Raise RecipeError for a model that would let texts of a row see each other under softmax, which it may be
    compared with."""
    if objective != "causal" or "bert" in config.model_type:
        raise RecipeError(
            f"--packing is for causal models whose mask follows position_ids, such as GPT-2; got a {objective} model"
            f" of type {config.model_type!r}. Leave --packing out: texts are then joined and cut into rows."
        )


class PackingCollator:
    """Rows of packed texts, with positions that restart, and their tokens as labels where a text predicts them.

    Every row has `length` tokens, so that rows stay rows on any number of processes. The few places that are left at
    the end of one are a text of their own, without labels.

    Args:
        padding: The token there.
    """

    def __init__(self, length: int, padding: int) -> None:
        self.length, self.padding = length, padding
        self.flatten = DataCollatorWithFlattening(separator_id=IGNORED)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batches = [self._row(row["input_ids"], row["position_ids"]) for row in rows]
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        return {**joined, "use_cache": False}  # which would keep one sequence a row

    def _row(self, ids: Sequence[int], positions: Sequence[int]) -> dict[str, torch.Tensor]:
        starts = [place for place, position in enumerate(positions) if position == 0]
        ends = [*starts[1:], len(ids)]
        texts = [{"input_ids": list(ids[start:end])} for start, end in zip(starts, ends, strict=True)]
        rest = self.length - len(ids)
        if rest:
            texts.append({"input_ids": [self.padding] * rest})
        batch = self.flatten(texts)
        batch["labels"][0, len(ids) :] = IGNORED
        return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
