"""What slots have read on several processes, as states that merge under one softmax.

What a process does not want gets the weight 0, by the same operations on all of them: graphs of one form have their
exchanges in one order in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attention_state import AttentionState, log_or_minus_inf, merge_states
from .collectives import SequenceGroup

# Up to so many processes all states are gathered, in one exchange; more of them merge what arrives, step by step.
GATHERED = 8


def states_before(state: AttentionState, group: SequenceGroup, gap: int = 1) -> list[AttentionState]:
    """What merges to the states of all processes that are `gap` or more parts before this one: an exclusive prefix."""
    if group.size <= GATHERED:
        return _gathered(state, group, range(group.rank - gap + 1))
    return [_scanned(state, group, gap, -1)]


def states_elsewhere(state: AttentionState, group: SequenceGroup, gap: int = 1) -> list[AttentionState]:
    """The same of all that are `gap` or more parts away, before or after."""
    if group.size <= GATHERED:
        return _gathered(state, group, [r for r in range(group.size) if abs(r - group.rank) >= gap])
    return [_scanned(state, group, gap, side) for side in (-1, 1)]


def scan_steps(processes: int, gap: int) -> list[int]:
    """From how far away states arrive in a scan, one after the other."""
    steps, step = [gap], 1
    while step < processes - gap:
        steps.append(step)
        step *= 2
    return steps


def _gathered(state: AttentionState, group: SequenceGroup, wanted: range | list[int]) -> list[AttentionState]:
    """The states of all processes; nothing has been read in those that are not `wanted`."""
    states = [unpacked(z) for z in group.gather(packed(state)).unbind(0)]
    return [only_if(rank in wanted, z) for rank, z in enumerate(states)]


def _scanned(state: AttentionState, group: SequenceGroup, gap: int, side: int) -> AttentionState:
    """The merge over one side: states move by `gap`, and then every step doubles of how many there are (Hillis and
    Steele's scan)."""
    found, *others = scan_steps(group.size, gap)
    merged = _arrived(state, group, side * found)
    for step in others:
        merged = merge_states([merged, _arrived(merged, group, side * step)])
    return merged


def _arrived(state: AttentionState, group: SequenceGroup, side: int) -> AttentionState:
    """The state of the process `side` parts after (negative: before)."""
    sent = packed(state)
    found = group.from_left(sent, -side) if side < 0 else group.from_right(sent, side)
    return only_if(0 <= group.rank + side < group.size, unpacked(found))


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


def from_left(state: AttentionState, group: SequenceGroup) -> AttentionState:
    """The state of the process before."""
    return _arrived(state, group, -1)


def from_right(state: AttentionState, group: SequenceGroup) -> AttentionState:
    """The state of the process after."""
    return _arrived(state, group, 1)


def packed(state: AttentionState) -> Tensor:
    """`[..., head_dim + 1]`: output and log-sum-exp as one tensor to exchange."""
    wide = torch.promote_types(state.output.dtype, state.lse.dtype)
    return torch.cat([state.output.to(wide), state.lse.to(wide).unsqueeze(-1)], -1)


def unpacked(x: Tensor) -> AttentionState:
    """The inverse of `packed`."""
    return AttentionState(x[..., :-1], x[..., -1])
