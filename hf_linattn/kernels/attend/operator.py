"""Softmax attention that keeps its log-sum-exp, differentiable in both: the operation all kinds are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..backends import current_backend
from ..operators import register_pair
from . import torch_kernel


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, visible: Tensor | None = None
) -> AttentionState:
    """Softmax of `query . key + bias` over the keys, applied to `value`, with its log-sum-exp.

    Nothing of size queries x keys is kept, neither for the backward pass nor at any time. Logits and log-sum-exps are
    in float32 or wider.

    Args:
        query: `[..., queries, dim]`. key: `[..., keys, dim]`. value: `[..., keys, head_dim]`; leading dimensions
            broadcast.
        bias: `[..., keys]`, `-inf` for a key that no query sees.
        visible: Broadcasts to `[..., queries, keys]`; False hides a key from a query.
    """
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    if bias is not None:
        lead = torch.broadcast_shapes(lead, bias.shape[:-1])
    if visible is not None:
        visible = torch.atleast_2d(visible)
        lead = torch.broadcast_shapes(lead, visible.shape[:-2])
    # As `[batch, heads, tokens, dim]`, with views wherever dimensions broadcast.
    folded = [query, key, value, None if bias is None else bias.unsqueeze(-1), visible]
    for place, x in enumerate(folded):
        if x is None:
            continue
        if len(lead) <= 2:
            folded[place] = x.expand(*[1] * (2 - len(lead)), *lead, -1, -1)
        else:  # all leading dimensions but the last become one: what is shared by all blocks stays one
            x = x[(None,) * (len(lead) + 2 - x.ndim)]
            own = x.shape[-3:]
            folded[place] = x.expand(*lead[:-1], *own).reshape(-1, *own).expand(-1, lead[-1], -1, -1)
    query, key, value, bias, visible = folded  # type: ignore[assignment]
    bias = None if bias is None else bias.squeeze(-1)
    visible = None if visible is None else visible.expand(-1, -1, query.shape[2], key.shape[2])
    output, lse = _attend(query, key, value, bias, visible, current_backend())
    if len(lead) != 2:
        output, lse = output.reshape(*lead, *output.shape[2:]), lse.reshape(*lead, lse.shape[2])
    return AttentionState(output, lse)


_attend = register_pair(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? visible) -> (Tensor output, Tensor lse)",
    torch_kernel,
    differentiable=(0, 1, 2, 3),
)
