"""Which road attention through slots takes: that of short inputs (`kernels/short_slots`), or any (`slot_attention`).

Both compute the same function. The short road is one operation with a few large products; it pays for every pair of
windows, so long inputs cannot take it.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.attention_state import AttentionState
from ..kernels.short_slots import short_slot_attention, suits_short
from ..kernels.short_slots.inputs import ShortInputs
from .ablation import ABLATED
from .layout import Blocks, fit_window
from .padding import Tokens
from .slot_attention import SlotOptions, exact_attention
from .slot_weights import LinearSlotWeights, SlotWeights
from .softmax import mask_logits


def attention_with_slots(
    tokens: Tokens,
    options: SlotOptions,
    query_weights: SlotWeights,
    key_weights: SlotWeights,
    slot_numbers: Tensor | None = None,
) -> AttentionState:
    """Queries read the keys of their window and heavy keys one by one, and all others through slots.

    Args:
        options: Some that `SlotOptions.check` lets pass.
        The others as in `ExactAttention.with_slots`.
    Returns: output `[batch, heads, tokens, head_dim]` and its log-sum-exp.
    """
    blocks = _short_blocks(tokens, options, query_weights, key_weights)
    if blocks is None:
        return exact_attention(tokens, options).with_slots(query_weights, key_weights, slot_numbers)
    return _short(tokens, blocks, query_weights, key_weights)  # type: ignore[arg-type]


def _short_blocks(
    tokens: Tokens, options: SlotOptions, query_weights: SlotWeights, key_weights: SlotWeights
) -> Blocks | None:
    """The windows of an input that takes the short road, else `None`.

    A `chunk_size` is a choice of what to compute how, and leaves none.
    """
    if not options.window_size or options.is_causal or options.overlap_window or options.num_heavy_keys:
        return None
    if options.dropout or options.chunk_size is not None or ABLATED:
        return None
    for weights in (query_weights, key_weights):
        if not isinstance(weights, LinearSlotWeights) or weights.pair_bias is not None:
            return None
    count = tokens.key.shape[2]
    blocks = Blocks(count, fit_window(options.window_size, count, tokens.grid), tokens.grid)
    if blocks.num_blocks == 1:  # which reads no slot
        return None
    suits = suits_short(tokens.query, blocks.num_blocks, blocks.members, query_weights.num_slots)
    return blocks if suits else None


def _short(
    tokens: Tokens, blocks: Blocks, query_weights: LinearSlotWeights, key_weights: LinearSlotWeights
) -> AttentionState:
    query, key, value = tokens.query, tokens.key, tokens.value
    query_bias, key_bias, has_hidden = query_weights.token_bias, key_weights.token_bias, tokens.visible is not None
    query_tokens = None if query_weights.tokens is query else query_weights.tokens
    key_tokens = None if key_weights.tokens is key else key_weights.tokens
    if tokens.visible is not None:
        key_bias = key_bias.masked_fill(~tokens.visible, float("-inf"))
    if blocks.grid is not None:
        if not blocks.is_whole:
            has_hidden, real = True, key.new_ones(1, 1, blocks.tokens, 1)
            hidden = blocks.split(real).flatten(2, 3) == 0
        else:
            hidden = None
        query, key, value, query_bias, key_bias = (
            blocks.split(x).flatten(2, 3) for x in (query, key, value, query_bias, key_bias)
        )
        query_tokens, key_tokens = (
            None if x is None else blocks.split(x).flatten(2, 3) for x in (query_tokens, key_tokens)
        )
        key_bias = mask_logits(key_bias, None if hidden is None else ~hidden)
    heads = query.shape[1]
    inputs = ShortInputs(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None if query_tokens is None else query_tokens.transpose(1, 2),
        None if key_tokens is None else key_tokens.transpose(1, 2),
        query_bias.squeeze(-1).transpose(1, 2),
        key_bias.squeeze(-1).transpose(1, 2),
        *_for_heads(heads, query_weights.slots, query_weights.slot_bias, key_weights.slots, key_weights.slot_bias),
    )
    state = short_slot_attention(inputs, blocks.members, has_hidden=has_hidden, with_lse=tokens.has_global)
    output, lse = state.output.transpose(1, 2), state.lse.transpose(1, 2)
    if blocks.grid is not None:
        windows = (blocks.num_blocks, blocks.members)
        output = blocks.join(output.unflatten(2, windows))
        lse = blocks.join(lse.unsqueeze(-1).unflatten(2, windows)).squeeze(-1)
    return AttentionState(output, lse)


def _for_heads(heads: int, *tensors: Tensor) -> list[Tensor]:
    """Slots `[.., slots, dim]` and their bias `[.., slots]`, of queries and of keys, with dimensions for rows (perhaps
    1) and heads."""
    found = []
    for x, ndim in zip(tensors, (4, 3, 4, 3), strict=True):
        x = x if x.ndim == ndim else x[(None,) * (ndim - x.ndim)]
        found.append(x if x.shape[1] == heads else x.expand(-1, heads, *x.shape[2:]))
    return found
