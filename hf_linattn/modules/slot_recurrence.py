"""What the kinds that read through slots share in their recurrent form."""

from __future__ import annotations

from torch import Tensor

from ..ops.exact import compute_dtype
from ..ops.recurrent.slots import Basis, SlotRecurrence
from ..ops.recurrent.window_tokens import Window
from .base import LinearAttention
from .config import AttentionConfig


def window_of(config: AttentionConfig) -> Window:
    """The exact window of a causal layer."""
    return Window(config.window_size or 0, config.overlap_window)


def slot_recurrence(
    layer: LinearAttention,
    basis: Basis,
    num_slots: int,
    *,
    scaling: float,
    chunk_size: int | None = None,
    in_half: tuple[str, ...] = (),
) -> SlotRecurrence:
    """The recurrent form of a layer that reads through slots."""
    return SlotRecurrence(
        basis,
        num_slots,
        window_of(layer.config),
        scaling,
        chunk_size=chunk_size,
        dropout=layer.config.slot_dropout if layer.training else 0.0,
        in_half=in_half,
    )


def like(query: Tensor) -> Tensor:
    """No tokens, but with the heads, dimension, device and dtype in which queries like these are computed."""
    return query[:, :, :0].to(compute_dtype(query, query, query))
