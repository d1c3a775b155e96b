"""Summaries of chunks that are pooled with weights that are trained; `learned.py` says which."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..noise import RowNoise
from ..softmax import mask_logits, softmax_with_lse
from .chunks import Summaries
from .layout import Chunks


@dataclass(frozen=True)
class LearnedSummariser:
    """How the chunks of a layer are summarised.

    Args:
        key_pooling, value_pooling: `[heads, head_dim]`: `u` and `w`.
        key_adapter, query_adapter: `[heads, head_dim, head_dim]`: `A` of the pooled key and `B` of the query.
        far_offset: `[heads]`: `g_0`, added to the log-mass of the chunks.
        far_slope, key_slope: `[heads, head_dim]`: what of it is linear in the query, and in the pooled key.
    """

    key_pooling: Tensor
    value_pooling: Tensor
    key_adapter: Tensor
    query_adapter: Tensor
    far_offset: Tensor
    far_slope: Tensor
    key_slope: Tensor

    uses_queries = False
    has_spread = False

    def __call__(
        self, query: Tensor | None, key: Tensor, value: Tensor, chunks: Chunks, noise: Tensor | RowNoise | bool = False
    ) -> Summaries:
        """Summaries of all chunks, in float32 or wider; queries and noise are not used."""
        wide = torch.promote_types(key.dtype, torch.float32)
        maps = self.to(wide)
        keys, values = chunks.take(key).to(wide), chunks.take(value).to(wide)
        pooled = _pool(keys, keys, maps.key_pooling, chunks.member)
        value_mean = _pool(values, keys, maps.value_pooling, chunks.member)
        return maps.of_pooled(pooled, value_mean, chunks.member.sum(-1).to(wide))

    def to(self, dtype: torch.dtype) -> LearnedSummariser:
        """The same in another dtype."""
        return replace(self, **{name: tensor.to(dtype) for name, tensor in vars(self).items()})

    def of_pooled(self, key: Tensor, value: Tensor, count: Tensor) -> Summaries:
        """Summaries of chunks of `count` `[batch or 1, chunks]` tokens, from their pooled keys and values, `[batch,
        heads, chunks, head_dim]`, all in the dtype of the maps."""
        key = key + key @ self.key_adapter
        key_mean = key + key @ self.query_adapter.mT + self.far_slope.unsqueeze(1)
        log_weight = count.log()[:, None] + self.far_offset.unsqueeze(1)
        log_weight = log_weight + (key @ self.key_slope.unsqueeze(-1)).squeeze(-1)
        return Summaries(key_mean, value, log_weight, None, learned=True)


def _pool(tokens: Tensor, keys: Tensor, weights: Tensor, member: Tensor) -> Tensor:
    """Means of `tokens` `[batch, heads, chunks, members, dim]`, weighted by a softmax of the keys; 0 for no member."""
    logits = mask_logits(keys @ weights[:, None, :, None], member[:, None, ..., None])
    return softmax_with_lse(logits.mT, tokens).output.squeeze(-2)
