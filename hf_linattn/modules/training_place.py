"""Where training is, as a layer knows it: the random numbers of a pass follow from it, not from torch's generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.favor.random_features import derive_seed
from ..ops.noise import RowNoise, SlotDropout
from ..ops.row_groups import RowGroups
from .contract import AttentionInputs

LARGEST_ROW = 2**31 - 1
_KEY_BITS = 32


class TrainingPlace:
    """The step and the first row of the batch that comes next, for one layer.

    They are one number in a tensor that is changed in place: compiled graphs read it without being compiled again, and
    nothing waits for a GPU. It is no buffer: DDP would give every process that of the first one.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows: int | None = None
        self._packed = torch.zeros((1,), dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        return self._packed.device

    @torch.no_grad()
    def tell(self, key: int, first_row: int, rows: int | None) -> None:
        """The key of this step and layer, the number of the first row in the global batch, the rows of a batch."""
        self.rows = rows
        self._packed.fill_((key & (2**_KEY_BITS - 1)) << (63 - _KEY_BITS) | first_row)

    def noise(self, query: Tensor, first_head: int = 0) -> RowNoise:
        """The random numbers of a batch `[batch, heads, ...]`, whose heads are those from `first_head` on.

        A batch of more than `rows` has several parts of every row, such as the answers of a multiple-choice question.
        """
        packed = self._packed.to(query.device, non_blocking=True)
        number = torch.arange(query.shape[0], device=query.device)
        parts = 1 if self.rows is None else -(-query.shape[0] // self.rows)
        rows = (packed & LARGEST_ROW) + number // parts
        key = packed >> (63 - _KEY_BITS)
        return RowNoise.keyed(key, rows & LARGEST_ROW, number % parts, first_head=first_head)


def step_key(seed: int, layer_seed: int, layer_idx: int, step: int) -> int:
    """What the numbers of one layer in one step begin with."""
    return derive_seed(seed, layer_seed, layer_idx, step, "noise")


def row_noise(layer: Any, query: Tensor, rows: RowGroups | None = None) -> RowNoise:
    """The random numbers of a training pass of a layer: those of its place in training, or of torch's generator.

    With `rows` there are some for every sequence; those of one row are its parts, in their order.

    The replicas of DataParallel do not know which rows of the batch they have: theirs are of the generator.
    """
    place = layer.training_place
    if rows is not None:
        query = query[:1, :, :1, :1].expand(rows.num_sequences, -1, -1, -1)
    if place is None or getattr(layer, "_is_replica", False):
        return RowNoise.drawn(query)
    split = getattr(layer, "local_heads", None)  # by tensor parallelism
    found: RowNoise = place.noise(query, 0 if split is None else split.rank * query.shape[1])
    return found


def slot_dropout(probability: float, inputs: AttentionInputs) -> float | SlotDropout:
    """The argument of the attention functions."""
    return probability if inputs.noise is None else SlotDropout(probability, inputs.noise)


def common_noise(inputs: AttentionInputs, like: Tensor) -> Tensor:
    """Standard normal numbers like `like` `[heads, members, dim]`, the same for all rows."""
    if inputs.noise is None:
        return torch.randn_like(like)
    return inputs.noise.for_all_rows().normal(like[None])[0].to(like)
