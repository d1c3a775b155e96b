"""Heavy keys: the few keys that most queries look at, seen exactly by every query instead of through slots."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attend import attend
from ..kernels.attention_state import AttentionState
from .padding import Tokens


@torch.no_grad()
def key_importance(tokens: Tokens) -> Tensor:
    """How much weight the row's queries give each key, `[batch, heads, tokens]`, `-inf` at padding.

    `mean(x) . y_n + var(x) . y_n^2 / 2`: the log of the mean of `exp(x . y_n)` over queries that were Gaussian with
    the row's mean and (diagonal) variance. O(tokens * head_dim).
    """
    visible = tokens.visible
    wide = torch.promote_types(tokens.query.dtype, torch.float32)
    query, key = tokens.query.to(wide), tokens.key.to(wide)
    if visible is None:
        mean = query.mean(2, keepdim=True)
        variance = (query - mean).square().mean(2, keepdim=True)
    else:
        count = tokens.lengths.clamp_min(1).to(query)[:, None, None, None]
        mean = query.sum(2, keepdim=True) / count  # padding holds zeros
        variance = (query - mean).square().masked_fill(~visible, 0.0).sum(2, keepdim=True) / count
    score = (key * mean).sum(-1) + (key.square() * variance).sum(-1) / 2
    return score if visible is None else score.masked_fill(~visible.squeeze(-1), float("-inf"))


def heavy_keys(tokens: Tokens, number: int) -> tuple[AttentionState, Tensor]:
    """Attend exactly to the `number` most important keys of every row and head (all, if there are fewer).

    Returns: What the queries read of them, and `[batch, heads, tokens, 1]`, True for the other real keys.
    Cost: O(tokens * number * head_dim). The choice carries no gradient.
    """
    score = key_importance(tokens)
    # A stable sort, so that of equal keys the first are taken, whatever stands behind them.
    chosen = score.argsort(dim=-1, descending=True, stable=True)[..., :number]
    index = chosen.unsqueeze(-1)
    key = tokens.key.gather(2, index.expand(-1, -1, -1, tokens.key.shape[-1]))
    value = tokens.value.gather(2, index.expand(-1, -1, -1, tokens.value.shape[-1]))
    seen = None if tokens.valid is None else score.gather(2, chosen).unsqueeze(-2) > float("-inf")
    others = torch.ones_like(score, dtype=torch.bool).scatter(2, chosen, False).unsqueeze(-1)
    others = others if tokens.visible is None else others & tokens.visible
    return attend(tokens.query, key, value, visible=seen), others
