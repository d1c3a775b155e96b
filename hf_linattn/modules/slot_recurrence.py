"""What the kinds that read through slots share in their recurrent form."""

from __future__ import annotations

from typing import Any

from .base import LinearAttention


def recurrence_options(layer: LinearAttention) -> dict[str, Any]:
    """Arguments of `favor_recurrence` and `lara_recurrence` that every layer's settings say."""
    config = layer.config
    return {
        "window_size": config.window_size or 0,
        "overlap_window": config.overlap_window,
        "slot_dropout": config.slot_dropout if layer.training else 0.0,
    }
