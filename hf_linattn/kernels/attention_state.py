"""The result of a softmax over one group of keys or slots, and how groups join under one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionState(NamedTuple):
    """The softmax-weighted mean over one group of keys or slots, and the log of the group's total weight.

    `output` is `[..., queries, head_dim]`, `lse` is `[..., queries]` (`-inf` where nothing was visible).
    """

    output: Tensor
    lse: Tensor


def shifted_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`exp(logits - max)` along the last dimension and the maximum, which is finite even if every logit is `-inf`."""
    top = logits.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    return (logits - top).exp(), top.squeeze(-1)


def consumed_logsumexp(logits: Tensor, *, has_hidden: bool = False) -> Tensor:
    """Log-sum-exp over the last dimension of logits that nobody else needs. Without gradient.

    has_hidden: Whether all of one sum may be `-inf`.
    """
    top = logits.amax(-1, keepdim=True)
    if has_hidden:
        top.clamp_min_(torch.finfo(logits.dtype).min)
    return logits.sub_(top).exp_().sum(-1).log_().add_(top.squeeze(-1))


def log_or_minus_inf(total: Tensor) -> tuple[Tensor, Tensor]:
    """A divisor that is never 0 and the logarithm of `total`, `-inf` (with zero gradient) where it is 0."""
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    return safe, safe.log().masked_fill(empty, float("-inf"))


def merge_states(partials: Sequence[AttentionState]) -> AttentionState:
    """The softmax over the union of disjoint groups, from the groups' partial results."""
    if len(partials) == 1:
        return partials[0]
    if len(partials) == 2:  # in one pass over the outputs
        first, second = partials
        top = torch.maximum(first.lse, second.lse).detach().clamp_min(torch.finfo(first.lse.dtype).min)
        weight = (second.lse - top).exp()
        total, log_total = log_or_minus_inf((first.lse - top).exp() + weight)
        share = (weight / total).unsqueeze(-1)
        dtype = torch.promote_types(first.output.dtype, second.output.dtype)
        output = torch.lerp(first.output.to(dtype), second.output.to(dtype), share.to(dtype))
        return AttentionState(output, log_total + top)
    weights, top = shifted_exp(torch.stack([p.lse for p in partials], dim=-1))
    total, log_total = log_or_minus_inf(weights.sum(-1))
    shares = weights / total.unsqueeze(-1)
    output = sum(p.output * shares[..., i, None] for i, p in enumerate(partials))  # type: ignore[assignment]
    return AttentionState(output, log_total + top)


def merge_logits(partial: AttentionState, logits: Tensor, values: Tensor) -> AttentionState:
    """`merge_states` with members whose logits are few: what they give together is never written out.

    Args:
        logits: `[..., queries, members]`, `-inf` where a member is not visible. values: `[..., members, head_dim]`.
    """
    top = torch.maximum(partial.lse, logits.amax(-1)).detach().clamp_min(torch.finfo(logits.dtype).min)
    own, weights = (partial.lse - top).exp(), (logits - top.unsqueeze(-1)).exp()
    total, log_total = log_or_minus_inf(own + weights.sum(-1))
    share, shares = (own / total).unsqueeze(-1), weights / total.unsqueeze(-1)
    output = partial.output * share.to(partial.output.dtype) + (shares @ values).to(partial.output.dtype)
    return AttentionState(output, log_total + top)
