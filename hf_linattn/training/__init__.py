"""Training converted models: what a training loop has to tell the attention layers, and attention transfer."""

from .callback import LinAttnCallback, redraw_projections
from .row_noise import key_noise
from .trainer import AttentionTransferTrainer
from .transfer import transfer_attention

__all__ = ["AttentionTransferTrainer", "LinAttnCallback", "key_noise", "redraw_projections", "transfer_attention"]
