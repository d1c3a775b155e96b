"""Attention through slots from given log-weights: states of blocks, and blocks that read each other without states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.attention_state import AttentionState, log_or_minus_inf, merge_states, shifted_exp
from .noise import Dropped
from .softmax import mask_logits, softmax_with_lse

# Up to this many blocks their states are combined with one weight per pair of blocks; beyond it by a logarithmic scan.
_DENSE_BLOCKS = 32


def states_around(states: AttentionState, before: Tensor, after: Tensor | None) -> AttentionState:
    """For reader t the merged state of the blocks `k < before[t]` and, unless it is `None`, `k >= after[t]`.

    Args:
        before: `[readers]`, less than the number of blocks (negative for none). after: `[readers]`, positive.
    """
    num_blocks = states.lse.shape[-2]
    if num_blocks <= _DENSE_BLOCKS:
        index = torch.arange(num_blocks, device=states.lse.device)
        visible = index < before[:, None]
        return _combine(states, visible if after is None else visible | (index >= after[:, None]))

    def take(prefix: AttentionState, length: Tensor) -> AttentionState:
        length = length.clamp(0, num_blocks - 1)
        return AttentionState(prefix.output.index_select(-3, length), prefix.lse.index_select(-2, length))

    left = take(_scan(states), before)
    if after is None:
        return left
    reverse = _scan(AttentionState(states.output.flip(-3), states.lse.flip(-2)))
    return merge_states([left, take(reverse, num_blocks - after)])


def _combine(states: AttentionState, visible: Tensor) -> AttentionState:
    """Block i gets the merge of the blocks k with `visible[i, k]`: a softmax over blocks, slot by slot."""
    lse = states.lse.transpose(-1, -2).unsqueeze(-2)  # [..., slots, 1, blocks]
    merged = softmax_with_lse(mask_logits(lse, visible), states.output.transpose(-2, -3))
    return AttentionState(merged.output.transpose(-2, -3), merged.lse.transpose(-1, -2))


def _shift(states: AttentionState, steps: int) -> AttentionState:
    """Move states `steps` blocks later, filling with the empty state."""
    return AttentionState(
        F.pad(states.output, (0, 0, 0, 0, steps, 0))[..., : states.output.shape[-3], :, :],
        F.pad(states.lse, (0, 0, steps, 0), value=float("-inf"))[..., : states.lse.shape[-2], :],
    )


def _scan(states: AttentionState) -> AttentionState:
    """Exclusive prefix merge by doubling: log2(blocks) steps over all blocks at once."""
    merged, step = _shift(states, 1), 1
    while step < states.lse.shape[-2]:
        merged = merge_states([merged, _shift(merged, step)])
        step *= 2
    return merged


def between_halves(
    query_logits: Tensor,
    key_logits: Tensor,
    value: Tensor,
    half: int,
    *,
    is_causal: bool,
    dropped: Dropped | None = None,
) -> AttentionState:
    r"""Slot attention between the two halves of every pair of neighbours, without forming the slots.

    Query t reads key n with weight `sum_j exp(a[t, j] + c[j, n])`, a product of two feature matrices. The stabiliser
    of the keys is taken over their half alone, all of which every query of the other half sees: no weight underflows
    because of a key that is not visible, and nothing of a later key enters an earlier query, not even a maximum.

    Args:
        query_logits, key_logits: `[..., tokens, slots]`, `tokens` a multiple of `2 * half`. value: `[..., tokens,
            head_dim]`.
        is_causal: Only right halves read, the left ones.
        dropped: Slots to leave out of a query's weights, as in `softmax_with_lse`.
    Cost: O(tokens * slots) exponentials, O(tokens * half * slots) multiplications.
    """

    def side(x: Tensor, number: int) -> Tensor:
        return x.unflatten(-2, (-1, 2, half))[..., number, :, :]

    value = value.to(key_logits.dtype)
    lowest = torch.finfo(key_logits.dtype).min
    outputs, masses = [], []
    for readers in (0, 1):
        if is_causal and readers == 0:
            outputs.append(torch.zeros_like(side(value, 0)))
            masses.append(torch.full_like(outputs[0][..., 0], float("-inf")))
            continue
        keys = side(key_logits, 1 - readers)
        slot_top = keys.detach().amax(-2, keepdim=True).clamp_min(lowest)
        query_features, top = shifted_exp(side(query_logits, readers) + slot_top)
        key_features = (keys - slot_top).exp().transpose(-1, -2)
        weights = query_features @ key_features
        total, log_total = log_or_minus_inf(weights.sum(-1))
        if dropped is not None:
            weights = query_features.masked_fill(side(dropped.mask, readers), 0.0) @ key_features
            total = total * dropped.kept
        outputs.append(weights @ side(value, 1 - readers) / total.unsqueeze(-1))
        masses.append(log_total + top)
    return AttentionState(torch.stack(outputs, dim=-3).flatten(-4, -2), torch.stack(masses, dim=-2).flatten(-3, -1))


def own_token(
    query_logits: Tensor, key_logits: Tensor, value: Tensor, *, dropped: Dropped | None = None
) -> AttentionState:
    """What every query reads through the slots from the key at its own position alone."""
    weights, top = shifted_exp(query_logits + key_logits)
    total, log_total = log_or_minus_inf(weights.sum(-1))
    if dropped is not None:
        value = value * (weights.masked_fill(dropped.mask, 0.0).sum(-1) / (total * dropped.kept)).unsqueeze(-1)
    return AttentionState(value.masked_fill((log_total == float("-inf")).unsqueeze(-1), 0.0), log_total + top)
