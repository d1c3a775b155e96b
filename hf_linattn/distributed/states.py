"""What slots have read on several processes, as states that merge under one softmax.

What a process does not want gets the weight 0, by the same operations on all of them: graphs of one form have their
exchanges in one order in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attention_state import AttentionState, log_or_minus_inf
from .collectives import SequenceGroup


def gather_states(state: AttentionState, group: SequenceGroup, wanted: range | list[int]) -> list[AttentionState]:
    """The states of all processes in one exchange; nothing has been read in those that are not `wanted`."""
    states = [unpacked(z) for z in group.gather(packed(state)).unbind(0)]
    return [only_if(rank in wanted, z) for rank, z in enumerate(states)]


def merge_over(state: AttentionState, group: SequenceGroup) -> AttentionState:
    """The merged states of all processes: a sum of weights relative to the largest."""
    top = group.maximum(state.lse).clamp_min(torch.finfo(state.lse.dtype).min)
    weight = (state.lse - top).exp().unsqueeze(-1)
    sums = group.reduce(torch.cat([weight * state.output, weight], -1))
    total, log_total = log_or_minus_inf(sums[..., -1])
    return AttentionState(sums[..., :-1] / total.unsqueeze(-1), log_total + top)


def only_if(wanted: bool, state: AttentionState) -> AttentionState:
    """The state, or one in which nothing has been read."""
    unwanted = torch.full((), not wanted, device=state.lse.device)
    return AttentionState(state.output, state.lse.masked_fill(unwanted, float("-inf")))


def packed(state: AttentionState) -> Tensor:
    """`[..., head_dim + 1]`: output and log-sum-exp as one tensor to exchange."""
    wide = torch.promote_types(state.output.dtype, state.lse.dtype)
    return torch.cat([state.output.to(wide), state.lse.to(wide).unsqueeze(-1)], -1)


def unpacked(x: Tensor) -> AttentionState:
    """The inverse of `packed`."""
    return AttentionState(x[..., :-1], x[..., -1])
