"""Training converted models: what a training loop has to tell the attention layers."""

from .callback import LinAttnCallback, redraw_projections

__all__ = ["LinAttnCallback", "redraw_projections"]
