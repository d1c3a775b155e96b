"""Masked tokens, drawn so that a resumed run, several processes and every evaluation see the same ones."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, default_data_collator

from .common import RecipeError

IGNORED = -100  # a label that no loss counts


class MaskingCollator:
    """Rows of one length, with masked tokens, and labels where a token was masked.

    What is masked is a function of the seed, the epoch and the tokens of the row: a global generator would be at
    another place after a resume, and in workers. Rows that have labels already, those of evaluation, stay as they are.

    Args:
        probability: Of a token to be predicted: 8 of 10 are replaced by the mask, 1 by a random token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> None:
        if tokenizer.mask_token is None:
            raise RecipeError(f"--objective masked needs a mask token; {type(tokenizer).__name__} has none.")
        self.masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it, too

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "labels" not in rows[0]:
            rows = [self.mask(row["input_ids"], int(self.epoch)) for row in rows]
        return default_data_collator(list(rows))

    def mask(self, ids: Sequence[int], epoch: int) -> dict[str, list[int]]:
        """Inputs and labels of one row. At least one token is predicted, so that no loss is a mean over nothing."""
        number = zlib.crc32(np.array([self.seed, epoch, *ids], dtype=np.int64).tobytes())
        self.masking.generator = torch.Generator().manual_seed(number)
        inputs, labels = self.masking.torch_mask_tokens(torch.tensor([ids]))
        self.masking.generator = None
        if bool((labels == IGNORED).all()):
            middle = len(ids) // 2
            labels[0, middle] = ids[middle]
        return {"input_ids": inputs[0].tolist(), "labels": labels[0].tolist()}

    def masked_once(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Rows of evaluation, masked for good, for `Dataset.map`."""
        found = [self.mask(ids, epoch=-1) for ids in rows["input_ids"]]
        return {name: [row[name] for row in found] for name in ("input_ids", "labels")}


def next_token_collator(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one length, with their tokens as labels."""
    batch = default_data_collator(list(rows))
    labels = batch["input_ids"].clone()
    labels[:, 0] = IGNORED  # nothing predicts it: the loss must not be divided by a number that counts it
    return {**batch, "labels": labels}
