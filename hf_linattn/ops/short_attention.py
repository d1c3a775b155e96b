"""Which road attention through slots takes: that of short inputs (`kernels/short_slots`), or any (`slot_attention`).

Both compute the same function. The short road is one operation with a few large products; it pays for every pair of
windows, so long inputs cannot take it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.attention_state import AttentionState
from ..kernels.short_slots import short_slot_attention, suits_short
from ..kernels.short_slots.inputs import ShortInputs, ShortOptions
from .ablation import ABLATED
from .layout import Blocks, fit_window
from .linear_weights import LinearSlotWeights
from .padding import Tokens
from .slot_attention import SlotOptions, exact_attention
from .slot_weights import SlotWeights


def attention_with_slots(
    tokens: Tokens,
    options: SlotOptions,
    query_weights: SlotWeights,
    key_weights: SlotWeights,
    slot_numbers: Tensor | None = None,
    probes: tuple[int, ...] = (),
) -> AttentionState:
    """Queries read the keys of their window and heavy keys one by one, and all others through slots.

    Args:
        options: Some that `SlotOptions.check` lets pass.
        probes: Tokens by which the mass of the slots is corrected; only where `corrects_mass` says so.
        The others as in `ExactAttention.with_slots`.
    Returns: output `[batch, heads, tokens, head_dim]` and its log-sum-exp.
    """
    blocks = None
    if isinstance(query_weights, LinearSlotWeights) and isinstance(key_weights, LinearSlotWeights):
        if query_weights.pair_bias is None and key_weights.pair_bias is None:
            blocks = short_blocks(tokens, options, query_weights.slots.shape[-2])
    if blocks is None:
        return exact_attention(tokens.scaled(), options).with_slots(query_weights, key_weights, slot_numbers)
    return _short(tokens, blocks, query_weights, key_weights, probes)  # type: ignore[arg-type]


def corrects_mass(
    tokens: Tokens, options: SlotOptions, query_weights: LinearSlotWeights, key_weights: LinearSlotWeights
) -> bool:
    """Whether `attention_with_slots` takes `probes`: of rows without padding that take the short road."""
    if tokens.grid is not None or tokens.visible is not None:
        return False
    if query_weights.pair_bias is not None or key_weights.pair_bias is not None:
        return False
    return short_blocks(tokens, options, query_weights.slots.shape[-2]) is not None


def short_blocks(tokens: Tokens, options: SlotOptions, slots: int) -> Blocks | None:
    """The windows of an input that takes the short road with linear weights, else `None`.

    A `chunk_size` is a choice of what to compute how, and leaves none.
    """
    if not options.window_size or options.is_causal or options.overlap_window or options.num_heavy_keys:
        return None
    if options.dropout or options.chunk_size is not None or ABLATED:
        return None
    count = tokens.key.shape[2]
    size = min(options.window_size, count) if tokens.grid is None else fit_window(options.window_size, 0, tokens.grid)
    blocks = Blocks(count, size, tokens.grid)
    if blocks.num_blocks == 1:  # which reads no slot
        return None
    suits = suits_short(tokens.query, blocks.num_blocks, blocks.members, slots)
    return blocks if suits else None


def _short(
    tokens: Tokens,
    blocks: Blocks,
    query_weights: LinearSlotWeights,
    key_weights: LinearSlotWeights,
    probes: tuple[int, ...],
) -> AttentionState:
    query, key, value = tokens.query, tokens.key, tokens.value
    assert tokens.root == query_weights.rule.root == key_weights.rule.root
    query_tokens, key_tokens = query_weights.tokens, key_weights.tokens
    query_bias, key_bias, visible = query_weights.given_bias, key_weights.given_bias, tokens.visible
    if query_bias is not None:
        query_bias = query_bias.expand(*query.shape[:3], 1).squeeze(-1).transpose(1, 2)
    if visible is not None:  # a bias of -inf hides a key
        if key_bias is None:
            key_bias = torch.zeros_like(visible, dtype=torch.float32)
        key_bias = key_bias.masked_fill(~visible, float("-inf"))
    if key_bias is not None:
        key_bias = key_bias.expand(*key.shape[:3], 1).squeeze(-1).transpose(1, 2)
    inputs = ShortInputs(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None if query_tokens is query else query_tokens.transpose(1, 2),
        None if key_tokens is key else key_tokens.transpose(1, 2),
        query_bias,
        key_bias,
        *_maps(key.shape[1], query_weights, key_weights),
    )
    options = ShortOptions(
        blocks.members,
        () if blocks.grid is None else (*blocks.grid, blocks.size),
        tokens.root,
        query_weights.rule.norm,
        key_weights.rule.norm,
        query_weights.rule.shift,
        key_weights.rule.spreads,
        visible is not None,
        tokens.global_tokens is not None,
        probes,
    )
    state = short_slot_attention(inputs, options)
    return AttentionState(state.output.transpose(1, 2), state.lse.transpose(1, 2))


def _maps(heads: int, *weights: LinearSlotWeights) -> Any:
    """Slots `[rows (perhaps 1), heads, slots, dim]` and their bias `[rows, heads, slots]`, of queries and of keys."""
    found: list[Tensor | None] = []
    for side in weights:
        slots, bias = side.slots, side.given_slot_bias
        if slots.ndim < 4:
            slots = slots[(None,) * (4 - slots.ndim)]
        if slots.shape[1] != heads:
            slots = slots.expand(-1, heads, -1, -1)
        if bias is not None:
            bias = bias[(None,) * (3 - bias.ndim)].expand(slots.shape[:3])
        found += slots, bias
    return found
