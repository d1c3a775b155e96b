"""Slots beside an exact local window, and causal slots: the parts that FAVOR and LARA share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .exact import causal_visibility, exact_partial
from .factored import LogWeights
from .layout import Blocks, fit_window
from .slots import Partial, between_halves, merge, own_key, states_before, states_elsewhere
from .tokens import Tokens


def slot_attention(
    tokens: Tokens,
    query: LogWeights,
    key: LogWeights,
    *,
    is_causal: bool,
    window_size: int,
    overlap_window: bool = False,
    num_heavy_keys: int = 0,
    chunk_size: int,
    dropout: float = 0.0,
    extra: Tensor | None = None,
) -> Partial:
    """Attention through slots, with the keys of the query's own block exact when there is a window.

    The slots a query reads then hold the keys of the other blocks only (of the earlier blocks if causal), so that no
    key counts twice. Within groups of blocks (`chunk_size` tokens) the blocks read each other directly, halves of a
    pair at a time; between groups every group's slots are summarised on their own and merged.

    Args:
        query, key: Log-weights `a[t, j]` and `c[j, n]`. With a window or global tokens they must be on the scale of
            `x . y`, constants included.
        extra: Added to `a`, `[batch, heads, tokens, slots]`, when `a` is not linear in the query.
        window_size: Tokens of a block (side of a square with a grid); 0 for none.
        chunk_size: Up to this many tokens, blocks that are close read each other without a state of their slots;
            changes the cost, not the result.
    Returns: output `[batch, heads, tokens, head_dim]` and its log mass.
    Cost: O(tokens * slots * head_dim) time; with blocks of size L also (tokens / L) * slots * head_dim memory.
    """
    if not is_causal and not window_size:
        return query.read(key.masked(tokens.key_visible).summarise(tokens.value), extra=extra, dropout=dropout)

    size = fit_window(window_size or 1, tokens.y.shape[2], tokens.grid)
    blocks = Blocks(tokens.y.shape[2], size, tokens.grid)
    members = size if tokens.grid is None else size**2
    # Blocks that are close read each other directly, in groups of 2^k; only groups get a state of their slots.
    per_group = 1 << max(0, min(chunk_size // members, _next_power_of_two(blocks.num_blocks)).bit_length() - 1)
    padding = -blocks.num_blocks % per_group

    def grouped(x: Tensor) -> Tensor:
        x = F.pad(blocks.split(x), (0, 0, 0, 0, 0, padding))
        return x.unflatten(-3, (-1, per_group)).flatten(-3, -2)

    real = (
        torch.ones_like(tokens.y[:1, :1, :, :1])
        if tokens.valid is None
        else tokens.valid[:, None, :, None].to(tokens.y)
    )
    valid = grouped(real) > 0
    value = grouped(tokens.value)
    query, key = query.map_tokens(grouped), key.map_tokens(grouped).masked(valid)
    extra = None if extra is None else grouped(extra)
    if window_size:
        visible = valid.squeeze(-1).unflatten(-1, (per_group, members)).unsqueeze(-2)
        if is_causal:
            visible = visible & causal_visibility(members, members, value.device)
        x, y = (grouped(z).unflatten(-2, (per_group, members)) for z in (tokens.x, tokens.y))
        near = exact_partial(x, y, value.unflatten(-2, (per_group, members)), visible)
        partials = [Partial(near.output.flatten(-3, -2), near.log_mass.flatten(-2, -1))]
    else:
        partials = []
    if not window_size or per_group > 1:
        query_logits, key_logits = query.dense(), key.dense()
        query_logits = query_logits if extra is None else query_logits + extra
    if not window_size:
        partials.append(own_key(query_logits, key_logits, value, dropout=dropout))
    half = members
    while half < per_group * members:
        partials.append(between_halves(query_logits, key_logits, value, half, is_causal=is_causal, dropout=dropout))
        half *= 2
    if value.shape[-3] > 1:
        states = key.summarise(value)
        far = states_before(states) if is_causal else states_elsewhere(states)
        partials.append(query.read(far, extra=extra, dropout=dropout))
    merged = merge(partials)

    def joined(x: Tensor) -> Tensor:
        return blocks.join(x.unflatten(-2, (per_group, members)).flatten(-4, -3)[..., : blocks.num_blocks, :, :])

    return Partial(joined(merged.output), joined(merged.log_mass.unsqueeze(-1)).squeeze(-1))


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
