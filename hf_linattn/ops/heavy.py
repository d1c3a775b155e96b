"""Heavy keys: the few keys that most queries look at, seen exactly by every query instead of through slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.attention_state import AttentionState
from .exact import exact_partial
from .tokens import Tokens


class HeavyKeys(NamedTuple):
    """`partial`: every query's exact attention to the heavy keys; `rest`: `[batch, heads, tokens, 1]`, True for the
    real keys that are not heavy."""

    partial: AttentionState
    rest: Tensor


@torch.no_grad()
def key_importance(tokens: Tokens) -> Tensor:
    """How much weight the row's queries give each key, `[batch, heads, tokens]`, `-inf` at padding.

    `mean(x) . y_n + var(x) . y_n^2 / 2`: the log of the mean of `exp(x . y_n)` over queries that were Gaussian with
    the row's mean and (diagonal) variance. O(tokens * head_dim).
    """
    visible = tokens.key_visible
    wide = torch.promote_types(tokens.x.dtype, torch.float32)
    x, y = tokens.x.to(wide), tokens.y.to(wide)
    if visible is None:
        mean = x.mean(2, keepdim=True)
        variance = (x - mean).square().mean(2, keepdim=True)
    else:
        count = tokens.lengths.clamp_min(1).to(x)[:, None, None, None]
        mean = x.sum(2, keepdim=True) / count  # padding holds zeros
        variance = (x - mean).square().masked_fill(~visible, 0.0).sum(2, keepdim=True) / count
    score = (y * mean).sum(-1) + (y.square() * variance).sum(-1) / 2
    return score if visible is None else score.masked_fill(~visible.squeeze(-1), float("-inf"))


def heavy_keys(tokens: Tokens, number: int) -> HeavyKeys:
    """Attend exactly to the `number` most important keys of every row and head (all, if there are fewer).

    Cost: O(tokens * number * head_dim). The choice carries no gradient.
    """
    score = key_importance(tokens)
    # A stable sort, so that of equal keys the first are taken, whatever stands behind them.
    chosen = score.argsort(dim=-1, descending=True, stable=True)[..., :number]
    index = chosen.unsqueeze(-1)
    y = tokens.y.gather(2, index.expand(-1, -1, -1, tokens.y.shape[-1]))
    value = tokens.value.gather(2, index.expand(-1, -1, -1, tokens.value.shape[-1]))
    seen = None if tokens.valid is None else score.gather(2, chosen).unsqueeze(-2) > float("-inf")
    rest = torch.ones_like(score, dtype=torch.bool).scatter(2, chosen, False).unsqueeze(-1)
    visible = tokens.key_visible
    return HeavyKeys(exact_partial(tokens.x, y, value, seen), rest if visible is None else rest & visible)
