"""Training converted models: what a training loop has to tell the attention layers, and attention transfer."""

from ..distributed.fully_sharded import shard_linear_attention
from .callback import LinAttnCallback, redraw_projections
from .trainer import AttentionTransferTrainer
from .transfer import transfer_attention

__all__ = [
    "AttentionTransferTrainer",
    "LinAttnCallback",
    "redraw_projections",
    "shard_linear_attention",
    "transfer_attention",
]
