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
    # One window reads no slot.
    return blocks if blocks.num_blocks > 1 and suits_short(tokens.query, blocks.num_blocks) else None


def _short(
    tokens: Tokens, blocks: Blocks, query_weights: LinearSlotWeights, key_weights: LinearSlotWeights
) -> AttentionState:
    on_grid = blocks.grid is not None

    def placed(x: Tensor) -> Tensor:
        """`[batch, heads, tokens, dim]` -> `[batch, tokens, heads, dim]`, window by window."""
        return (blocks.split(x).flatten(2, 3) if on_grid else x).transpose(1, 2)

    has_hidden = tokens.visible is not None or (on_grid and not blocks.is_whole)
    key_bias = key_weights.token_bias
    if tokens.visible is not None:
        key_bias = key_bias.masked_fill(~tokens.visible, float("-inf"))
    key_bias = placed(key_bias)
    if on_grid and not blocks.is_whole:
        real = placed(tokens.key.new_ones(1, 1, blocks.tokens, 1)) > 0
        key_bias = key_bias.masked_fill(~real, float("-inf"))
    query, key, heads = placed(tokens.query), placed(tokens.key), tokens.query.shape[1]
    state = short_slot_attention(
        ShortInputs(
            query,
            key,
            placed(tokens.value),
            None if query_weights.tokens is tokens.query else placed(query_weights.tokens),
            None if key_weights.tokens is tokens.key else placed(key_weights.tokens),
            placed(query_weights.token_bias).squeeze(-1),
            key_bias.squeeze(-1),
            _per_head(query_weights.slots, heads, 4),
            _per_head(query_weights.slot_bias, heads, 3),
            _per_head(key_weights.slots, heads, 4),
            _per_head(key_weights.slot_bias, heads, 3),
        ),
        blocks.members,
        has_hidden=has_hidden,
        with_lse=tokens.has_global,
    )
    output, lse = state.output.transpose(1, 2), state.lse.transpose(1, 2)
    if on_grid:
        windows = (blocks.num_blocks, blocks.members)
        output = blocks.join(output.unflatten(2, windows))
        lse = blocks.join(lse.unsqueeze(-1).unflatten(2, windows)).squeeze(-1)
    return AttentionState(output, lse)


def _per_head(x: Tensor, heads: int, ndim: int) -> Tensor:
    """What slots have, with dimensions for rows (perhaps 1) and heads."""
    x = x[(None,) * (ndim - x.ndim)]
    return x if x.shape[1] == heads else x.expand(-1, heads, *x.shape[2:])
