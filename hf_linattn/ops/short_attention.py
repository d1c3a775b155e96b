"""Which road attention through slots takes: that of short inputs (`kernels/short_slots`), or any (`slot_attention`).

Both compute the same function. The short road is one operation with a few large products; it pays for every pair of
windows, so long inputs cannot take it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention_state import AttentionState
from ..kernels.short_slots import short_slot_attention, suits_short
from ..kernels.short_slots.inputs import ShortInputs, ShortOptions
from .ablation import ABLATED
from .layout import Blocks, fit_window
from .padding import Tokens
from .slot_attention import SlotOptions, exact_attention
from .slot_weights import LinearSlotWeights, SlotWeights


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
    if _are_linear(query_weights) and _are_linear(key_weights):
        blocks = short_blocks(tokens, options, query_weights.num_slots)
    if blocks is None:
        return exact_attention(tokens.scaled(), options).with_slots(query_weights, key_weights, slot_numbers)
    return _short(tokens, blocks, query_weights, key_weights, probes)  # type: ignore[arg-type]


def corrects_mass(
    tokens: Tokens, options: SlotOptions, query_weights: LinearSlotWeights, key_weights: LinearSlotWeights
) -> bool:
    """Whether `attention_with_slots` takes `probes`: of rows without padding that take the short road."""
    if tokens.grid is not None or tokens.visible is not None or not _are_linear(query_weights):
        return False
    return _are_linear(key_weights) and short_blocks(tokens, options, query_weights.num_slots) is not None


def _are_linear(weights: SlotWeights) -> bool:
    return isinstance(weights, LinearSlotWeights) and weights.pair_bias is None


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
    query, key, value, has_hidden = tokens.query, tokens.key, tokens.value, tokens.visible is not None
    assert tokens.root == query_weights.rule.root == key_weights.rule.root
    of_tokens: list[Any] = [
        query,
        key,
        value,
        None if query_weights.tokens is query else query_weights.tokens,
        None if key_weights.tokens is key else key_weights.tokens,
        _for_tokens(query_weights.given_bias, query),
        _hiding(_for_tokens(key_weights.given_bias, key), tokens.visible),
    ]
    *of_tokens, query_bias, key_bias = (None if x is None else x.transpose(1, 2) for x in of_tokens)
    shape = (key.shape[0], -1, key.shape[1])
    biases = [
        None if query_bias is None else query_bias.squeeze(-1),
        None if key_bias is None else key_bias.squeeze(-1).expand(shape),
    ]
    inputs = ShortInputs._make([*of_tokens, *biases, *_for_heads(key.shape[1], query_weights, key_weights)])
    options = ShortOptions(
        blocks.members,
        () if blocks.grid is None else (*blocks.grid, blocks.size),
        tokens.root,
        query_weights.rule.norm,
        key_weights.rule.norm,
        query_weights.rule.shift,
        key_weights.rule.spreads,
        has_hidden,
        tokens.global_tokens is not None,
        probes,
    )
    state = short_slot_attention(inputs, options)
    return AttentionState(state.output.transpose(1, 2), state.lse.transpose(1, 2))


def _for_tokens(bias: Tensor | None, tokens: Tensor) -> Tensor | None:
    """A bias `[batch, heads, tokens or 1, 1]` for all of them."""
    return bias if bias is None or bias.shape[:3] == tokens.shape[:3] else bias.expand(*tokens.shape[:3], 1)


def _hiding(bias: Tensor | None, visible: Tensor | None) -> Tensor | None:
    """A bias of keys, `-inf` where they are not `visible` (`[batch or 1, 1, tokens, 1]`)."""
    if visible is None:
        return bias
    if bias is None:
        return torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, float("-inf"))
    return bias.masked_fill(~visible, float("-inf"))


def _for_heads(heads: int, *weights: LinearSlotWeights) -> Iterator[Tensor | None]:
    """Slots `[rows (perhaps 1), heads, slots, dim]` and their bias `[rows, heads, slots]`, of queries and of keys."""
    for side in weights:
        for x, ndim in ((side.slots, 4), (side.given_slot_bias, 3)):
            if x is not None:
                x = x if x.ndim == ndim else x[(None,) * (ndim - x.ndim)]
                x = x if x.shape[1] == heads else x.expand(-1, heads, *x.shape[2:])
            yield x
