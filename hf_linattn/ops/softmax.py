r"""The dense softmax with its log-sum-exp, in readable form; `kernels.attend` is the operation that all kinds use.

Every kind is a self-normalised estimator of softmax attention and can be written as two softmaxes:

    slot value   u_j = sum_n softmax_n(c[j, n]) v_n        what slot j has read from the keys
    slot mass    b_j = logsumexp_n c[j, n]                  the log of how much those keys weigh
    output       o_t = sum_j softmax_j(a[t, j] + b_j) u_j   what query t reads from the slots

A slot is a random feature (FAVOR), a sample of a proposal (LARA) or a chunk with its control variate (EVA); a kind is
a choice of `a` and `c`. A group of keys or slots is fully described by its output and its log-sum-exp
(`AttentionState`), so groups are joined under one softmax by `merge_states`.

No epsilon anywhere: all weights lie in [0, 1], a group without a visible member has log-sum-exp `-inf` and output 0,
and gradients through such a group are 0. Logits are float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attend import attend
from ..kernels.attention_state import AttentionState, log_or_minus_inf, shifted_exp
from .inputs import checked_attention, scale_inputs
from .noise import Dropped
from .padding import without_padding


def softmax_with_lse(logits: Tensor, values: Tensor, *, dropped: Dropped | None = None) -> AttentionState:
    """Softmax over the last dimension of `logits`, applied to `values`; keeps the log-sum-exp.

    Args:
        logits: `[..., queries, members]`; `-inf` where a member is not visible.
        values: `[..., members, head_dim]`.
        dropped: Weights to leave out (after normalisation; the others are rescaled), for training.
    """
    weights, top = shifted_exp(logits)
    values = values.to(weights.dtype)
    total, log_total = log_or_minus_inf(weights.sum(-1))
    if dropped is not None:
        weights, total = weights.masked_fill(dropped.mask, 0.0), total * dropped.kept
    if values.shape[-2] < values.shape[-1]:  # fewer weights than results: cheaper to normalise the weights
        return AttentionState((weights / total.unsqueeze(-1)) @ values, log_total + top)
    return AttentionState(weights @ values / total.unsqueeze(-1), log_total + top)


def mask_logits(logits: Tensor, visible: Tensor | None) -> Tensor:
    """`-inf` where `visible` is False."""
    return logits if visible is None else logits.masked_fill(~visible, float("-inf"))


def without_empty(state: AttentionState) -> AttentionState:
    """Output 0 for queries that have read nothing."""
    empty = (state.lse == float("-inf")).unsqueeze(-1)
    return AttentionState(state.output.masked_fill(empty, 0.0), state.lse)


def causal_visibility(query_tokens: int, key_tokens: int, device: torch.device) -> Tensor:
    """`[queries, keys]` bool, aligned at the end: the last query sees every key."""
    rows = torch.arange(query_tokens, device=device)[:, None] + (key_tokens - query_tokens)
    return torch.arange(key_tokens, device=device)[None, :] <= rows


def visible_keys(query: Tensor, key: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Which keys a query may read, `[batch or 1, 1, queries or 1, keys]`; `None` for all."""
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if not is_causal:
        return visible
    causal = causal_visibility(query.shape[2], key.shape[2], query.device)
    return causal if visible is None else causal & visible


@checked_attention
def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    real_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Exact softmax attention: what every kind is measured against.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1. Differs from it: a query without any visible key gives
        0.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, heads, keys, head_dim]`.
        key_mask: `[batch, keys]` bool, True where a key is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        is_causal: No query sees a later key; the last query is aligned with the last key.
        cu_seqlens, max_seqlen, real_first, backend: As in `favor_attention`.
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`.
    Raises: InputError if the shapes do not fit.
    Cost: O(queries * keys * head_dim) time. Memory: that of inputs and output, and what the kernel needs at a time; a
        mask that depends on the query (`is_causal`) takes O(queries * keys) as well. Random: no.
    """
    key, value = without_padding(key, value, key_mask)
    visible = visible_keys(query, key, key_mask, is_causal)
    return attend(*scale_inputs(query, key, scaling), value, visible=visible).output
