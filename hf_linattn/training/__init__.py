"""Training converted models: what a training loop has to tell the attention layers, and attention transfer."""

from ..distributed.context import reduce_gradients
from ..distributed.fully_sharded import shard_linear_attention
from .callback import LinAttnCallback, redraw_projections
from .context_parallel import context_parallel
from .context_parallel_trainer import ContextParallelTrainer
from .row_noise import key_noise
from .token_heads import loss_weights
from .trainer import AttentionTransferTrainer
from .transfer import transfer_attention

__all__ = [
    "AttentionTransferTrainer",
    "ContextParallelTrainer",
    "LinAttnCallback",
    "context_parallel",
    "key_noise",
    "loss_weights",
    "redraw_projections",
    "reduce_gradients",
    "shard_linear_attention",
    "transfer_attention",
]
