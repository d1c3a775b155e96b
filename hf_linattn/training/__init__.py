"""Training converted models: what a training loop has to tell the attention layers, and attention transfer."""

from .callback import LinAttnCallback, redraw_projections
from .transfer import AttentionTransferTrainer, transfer_attention

__all__ = ["AttentionTransferTrainer", "LinAttnCallback", "redraw_projections", "transfer_attention"]
