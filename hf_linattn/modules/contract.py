"""What passes between an attention layer and those who use it: calls, shapes, tensors, a calibration, a memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.noise import RowNoise
from ..ops.row_groups import RowGroups

# The buffer of a layer with statistics of data that counts the tokens they are of; 0 until calibrated.
CALIBRATED_TOKENS = "calibrated_tokens"


@dataclass(frozen=True)
class AttentionInputs:
    """One call of a layer: what `LinearAttention.forward` documents, all of it filled in.

    noise: Where random numbers come from, in training; `None` for torch's generator. With `rows` those of sequences.
    rows: The sequences of the batch in groups, where it is computed by them; then `key_mask` says nothing.
    real_first: The rows are those of a group.
    shortest: Every row has at least so many real tokens, as far as is known.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    scaling: float
    is_causal: bool
    grid: tuple[int, int] | None = None
    training: bool = False
    noise: RowNoise | None = None
    rows: RowGroups | None = None
    real_first: bool = False
    shortest: int = 0


@dataclass(frozen=True)
class LayerShape:
    """What a layer's tensors depend on besides the settings."""

    num_heads: int
    head_dim: int
    layer_idx: int = 0
    is_causal: bool = False


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state.

    Args:
        learned: Whether it is a parameter; the others are float32 buffers.
        draw: First value: float32, on the CPU, the same on every machine and rank.
        optional: Whether `compute` does without a learned tensor: native mode has none.
        redraw: Value number n of a buffer that gets a new one every `redraw_interval` training steps; number 0 is the
            first.
    """

    shape: tuple[int, ...]
    learned: bool
    draw: Callable[[], Tensor]
    optional: bool = False
    redraw: Callable[[int], Tensor] | None = None


def zeros(*shape: int, learned: bool = False) -> StateTensor:
    """A tensor that begins with zeros; a learned one is optional, zero being as good as nothing."""
    return StateTensor(shape, learned=learned, draw=lambda: torch.zeros(shape), optional=learned)


class Calibration(Protocol):
    """Statistics of one layer's queries and keys, gathered batch by batch (`LinearAttention.new_calibration`).

    Knows nothing of processes: `hf_linattn.calibrate` exchanges the states of all ranks and has them merged in rank
    order, so that every rank ends with the same buffers.
    """

    def update(self, inputs: AttentionInputs) -> None:
        """Take in one batch; padding does not count."""

    def state(self) -> dict[str, Tensor]:
        """What has been gathered, as tensors whose shapes and dtypes do not depend on the data."""

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Replace what has been gathered by the union of several states (this one's among them)."""

    def result(self) -> dict[str, Tensor]:
        """New values of the layer's buffers. Raises `InputError` if too little has been seen."""


class Memory(Protocol):
    """What a causal layer has seen of sequences that are still growing (`modules.memory.RecurrentMemory`)."""

    def attend(self, layer: Any, inputs: AttentionInputs) -> Tensor:
        """What the queries of the new tokens read; the tokens are part of the memory afterwards."""


class LayerClass(Protocol):
    """What the library asks of the class of a kind's layers, a subclass of `modules.base.LinearAttention`."""

    def __call__(self, config: Any, shape: LayerShape) -> Any: ...

    def check(self, config: Any, shape: LayerShape) -> None: ...

    def check_grid(self, config: Any, *, is_image: bool) -> None: ...

    def native_refusal(self, config: Any, shape: LayerShape, *, training: bool) -> str | None: ...

    def state_spec(self, config: Any, shape: LayerShape) -> dict[str, StateTensor]: ...

    def compute(self, config: Any, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor: ...

    def is_exact_in_window(self, config: Any) -> bool: ...

    def compute_or_exact(self, config: Any, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor: ...

    def compute_or_record(self, config: Any, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor: ...

    def supports_recurrence(self, config: Any, *, is_causal: bool) -> bool: ...
