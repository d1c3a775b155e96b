"""Slots beside an exact local window, and causal slots: the parts that FAVOR and LARA share."""

from __future__ import annotations

from torch import Tensor

from .exact import causal_visibility, exact_partial
from .layout import Blocks
from .slots import (
    Partial,
    block_states,
    causal_within_blocks,
    mask_logits,
    merge,
    states_before,
    states_elsewhere,
    through_slots,
    weigh,
)
from .tokens import Tokens


def slot_attention(
    tokens: Tokens,
    query_logits: Tensor,
    key_logits: Tensor,
    *,
    is_causal: bool,
    window_size: int,
    chunk_size: int,
    dropout: float = 0.0,
) -> Partial:
    """Attention through slots, with the keys of the query's own block exact when there is a window.

    The slots a query reads then hold the keys of the other blocks only (of the earlier blocks if causal), so that no key
    counts twice. For that, every block's slots are summarised on their own and merged.

    Args:
        query_logits, key_logits: `[batch, heads, tokens, slots]`, `a[t, j]` and `c[j, n]`. With a window or global tokens
            they must be on the scale of `x . y`, constants included.
        window_size: Tokens of a block (side of a square with a grid); 0 for none.
        chunk_size: Tokens per block in the causal form without a window; a power of two.
    Returns: output `[batch, heads, tokens, head_dim]` and its log mass.
    Cost: O(tokens * slots * head_dim) time; with blocks of size L also (tokens / L) * slots * head_dim memory.
    """
    key_logits = mask_logits(key_logits, tokens.key_visible)
    if not is_causal and not window_size:
        return through_slots(query_logits, key_logits, tokens.value, dropout=dropout)

    num_tokens = tokens.y.shape[2]
    size = window_size or chunk_size
    blocks = Blocks(num_tokens, size, tokens.grid)
    valid = blocks.valid(tokens.valid, tokens.y.device)[:, None]  # [batch or 1, 1, blocks, size]
    value = blocks.split(tokens.value)
    block_queries = blocks.split(query_logits)
    block_keys = mask_logits(blocks.split(key_logits), valid.unsqueeze(-1))

    if window_size:
        visible = valid.unsqueeze(-2)
        if is_causal:
            visible = visible & causal_visibility(size, size, value.device)
        near = exact_partial(blocks.split(tokens.x), blocks.split(tokens.y), value, visible)
    else:
        near = causal_within_blocks(block_queries, block_keys, value)
    if blocks.num_blocks == 1:
        return _joined(blocks, near)
    states = block_states(block_keys, value)
    far_states = states_before(states) if is_causal else states_elsewhere(states)
    far = weigh(block_queries + far_states.log_mass.unsqueeze(-2), far_states.output, dropout=dropout)
    return _joined(blocks, merge([near, far]))


def _joined(blocks: Blocks, partial: Partial) -> Partial:
    return Partial(blocks.join(partial.output), blocks.join(partial.log_mass.unsqueeze(-1)).squeeze(-1))


def largest_power_of_two(limit: int) -> int:
    """The largest power of two that is at most `limit` (and at least 1)."""
    return 1 << max(0, limit.bit_length() - 1)


