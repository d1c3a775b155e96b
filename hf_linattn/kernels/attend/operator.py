"""Softmax attention that keeps its log-sum-exp, differentiable in both: the operation all kinds are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..backend import current_backend
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
        lead = torch.broadcast_shapes(lead, visible.shape[:-2])
        visible = _fold(torch.atleast_2d(visible), lead).expand(-1, -1, query.shape[-2], key.shape[-2])
    if bias is not None and (bias.ndim != 3 or bias.shape[:2] != lead):
        bias = _fold(bias.unsqueeze(-1), lead).squeeze(-1)
    if len(lead) == 2:  # the usual case, batch and heads: no copies
        query, key, value = query.expand(*lead, -1, -1), key.expand(*lead, -1, -1), value.expand(*lead, -1, -1)
        return AttentionState(*_Attend.apply(query, key, value, bias, visible, current_backend()))
    query, key, value = _fold(query, lead), _fold(key, lead), _fold(value, lead)
    output, lse = _Attend.apply(query, key, value, bias, visible, current_backend())
    return AttentionState(output.reshape(*lead, *output.shape[2:]), lse.reshape(*lead, lse.shape[2]))


def _fold(x: Tensor, lead: torch.Size) -> Tensor:
    """`[..., tokens, dim]` with leading dimensions that broadcast to `lead`, as `[batch, heads, tokens, dim]`.

    Only dimensions that differ are written out: what is shared by all blocks stays one.
    """
    if len(lead) <= 2:
        return x.expand(*[1] * (2 - len(lead)), *lead, -1, -1)
    x = x[(None,) * (len(lead) + 2 - x.ndim)]
    last = x.shape[-3]
    x = x.expand(*lead[:-1], last, -1, -1).reshape(-1, last, *x.shape[-2:])  # all but the last leading dimension
    return x.expand(-1, lead[-1], -1, -1)


_Attend = register_pair(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? visible) -> (Tensor output, Tensor lse)",
    torch_kernel,
    differentiable=(0, 1, 2, 3),
)
