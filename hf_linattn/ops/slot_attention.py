"""Slots beside an exact local window, and causal slots: the parts that FAVOR and LARA share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, UnsupportedError
from ..kernels.attention_state import AttentionState, merge_states
from ..kernels.block_slots import BlockReach
from .exact import causal_visibility, exact_partial
from .heavy import heavy_keys
from .layout import Blocks, fit_window, pad_tokens
from .slot_weights import SlotWeights
from .slots import between_halves
from .tokens import Tokens

# Measured on a CPU core with 256 slots (docs/decisions.md): tokens of a chunk that read each other one by one (causal,
# no window), and up to how many tokens small windows form a group with one state of its slots.
_CAUSAL_CHUNK = 64
_WINDOW_CHUNK = 32


def slot_attention(
    tokens: Tokens,
    query: SlotWeights,
    key: SlotWeights,
    *,
    is_causal: bool,
    window_size: int,
    overlap_window: bool = False,
    num_heavy_keys: int = 0,
    chunk_size: int | None,
    dropout: float = 0.0,
    extra: Tensor | None = None,
) -> AttentionState:
    """Attention through slots, with the keys near the query exact when there is a window.

    The slots a query reads then hold the other keys only (of these the earlier ones if causal), so that no key counts
    twice.

    Args:
        query, key: Log-weights `a[t, j]` and `c[j, n]`. With a window, heavy or global tokens they must be on the
            scale of `x . y`, constants included.
        extra: Added to `a`, `[batch, heads, tokens, slots]`, when `a` is not linear in the query.
        window_size: Tokens of a block (side of a square with a grid); 0 for none.
        overlap_window: A query also sees half a block to each side of its own exactly (causal: the whole block
            before). Sequences only.
        num_heavy_keys: That many keys of the row are seen exactly by every query (bidirectional only).
        chunk_size: Up to this many tokens, a power of two, blocks that are close read each other without a state of
            their slots; changes the cost, not the result. `None`: what was measured to be fast.
    Returns: output `[batch, heads, tokens, head_dim]` and its log mass.
    Raises: InputError, UnsupportedError for options that do not go together.
    Cost: O(tokens * slots * head_dim) time; with blocks of size L also (tokens / L) * slots * head_dim memory.
    """
    _check_options(is_causal, window_size, overlap_window, num_heavy_keys, tokens.grid)
    num_tokens = tokens.y.shape[2]
    visible, partials = tokens.key_visible, []
    if num_heavy_keys:
        heavy = heavy_keys(tokens, num_heavy_keys)
        visible, partials = heavy.rest, [heavy.partial]
    if not is_causal and not window_size:
        slots = key.masked(visible).summarise(tokens.value)
        partials.append(query.read(slots, extra=extra, dropout=dropout))
    else:
        arguments = (tokens, query, key, visible, extra, is_causal, dropout)
        if not window_size:
            chunk = min(chunk_size or _CAUSAL_CHUNK, _next_power_of_two(num_tokens))
            keys = key.masked(visible)
            partials.append(query.causal(keys, tokens.value, chunk=chunk, extra=extra, dropout=dropout))
        elif overlap_window and window_size < num_tokens:
            partials.append(_overlapping(*arguments, window_size=window_size))
        else:
            size = fit_window(window_size, num_tokens, tokens.grid)
            partials.append(_windows(*arguments, size=size, chunk_size=chunk_size or _WINDOW_CHUNK))
    return merge_states(partials)


def _check_options(
    is_causal: bool, window_size: int, overlap_window: bool, num_heavy_keys: int, grid: tuple[int, int] | None
) -> None:
    if num_heavy_keys < 0:
        raise InputError(f"num_heavy_keys must be >= 0; got {num_heavy_keys!r}.")
    if num_heavy_keys and is_causal:
        raise UnsupportedError(
            f"Heavy keys are chosen by all queries of the row, which a causal layer forbids; got"
            f" num_heavy_keys={num_heavy_keys}. Set it to 0."
        )
    if not overlap_window:
        return
    if window_size < 2 or window_size % 2:
        raise InputError(f"overlap_window=True needs an even window_size >= 2; got {window_size!r}.")
    if grid is not None:
        raise UnsupportedError(
            f"overlap_window=True works on sequences here, not on a grid; got grid={grid!r}. EVA has overlapping"
            " windows on grids; otherwise use overlap_window=False with a larger window_size."
        )


def _windows(
    tokens: Tokens,
    query: SlotWeights,
    key: SlotWeights,
    key_visible: Tensor | None,
    extra: Tensor | None,
    is_causal: bool,
    dropout: float,
    *,
    size: int,
    chunk_size: int,
) -> AttentionState:
    """Disjoint windows: a query sees its own one exactly.

    Within groups of windows (`chunk_size` tokens) the windows read each other directly, halves of a pair at a time;
    between groups every group's slots are summarised on their own and merged.
    """
    blocks = Blocks(tokens.y.shape[2], size, tokens.grid)
    members = size if tokens.grid is None else size**2
    per_group = 1 << max(0, min(chunk_size // members, _next_power_of_two(blocks.num_blocks)).bit_length() - 1)
    padding = -blocks.num_blocks % per_group

    def grouped(x: Tensor) -> Tensor:
        x = F.pad(blocks.split(x), (0, 0, 0, 0, 0, padding)) if padding else blocks.split(x)
        return x.unflatten(-3, (-1, per_group)).flatten(-3, -2)

    valid = _real(tokens, key_visible, grouped)
    value = grouped(tokens.value)
    query, key = query.map_tokens(grouped), key.map_tokens(grouped).masked(valid)
    extra = None if extra is None else grouped(extra)

    visible = None if valid is None else valid.squeeze(-1).unflatten(-1, (per_group, members)).unsqueeze(-2)
    if is_causal:
        earlier = causal_visibility(members, members, value.device)
        visible = earlier if visible is None else visible & earlier
    x, y = (grouped(z).unflatten(-2, (per_group, members)) for z in (tokens.x, tokens.y))
    near = exact_partial(x, y, value.unflatten(-2, (per_group, members)), visible)
    partials, reader, through = (
        [AttentionState(near.output.flatten(-3, -2), near.lse.flatten(-2, -1))],
        query.unbiased(),
        [],
    )
    if per_group > 1:
        query_logits, key_logits = reader.dense(), key.dense()
        query_logits = query_logits if extra is None else query_logits + extra
    half = members
    while half < per_group * members:
        through.append(between_halves(query_logits, key_logits, value, half, is_causal=is_causal, dropout=dropout))
        half *= 2
    if value.shape[-3] > 1:
        through.append(reader.inter_block(key, value, BlockReach(is_causal=is_causal), extra=extra, dropout=dropout))
    if through:
        partials.append(query.biased(merge_states(through)))

    def joined(x: Tensor) -> Tensor:
        return blocks.join(x.unflatten(-2, (per_group, members)).flatten(-4, -3)[..., : blocks.num_blocks, :, :])

    return _joined(merge_states(partials), joined)


def _overlapping(
    tokens: Tokens,
    query: SlotWeights,
    key: SlotWeights,
    key_visible: Tensor | None,
    extra: Tensor | None,
    is_causal: bool,
    dropout: float,
    *,
    window_size: int,
) -> AttentionState:
    """Blocks whose windows reach beyond them, to the border of a unit: slots are summarised per unit.

    Bidirectional: a unit is half a block, and block t sees units `2t - 1 .. 2t + 2`. Causal: a unit is a block, and
    block t sees units `t - 1` and `t`.
    """
    num_tokens = tokens.y.shape[2]
    reach = BlockReach(1, 1, True) if is_causal else BlockReach(2, 1, False)
    unit = window_size // reach.units
    blocks, units = Blocks(num_tokens, window_size), Blocks(num_tokens, unit)
    slots = window_size + (unit if is_causal else 2 * unit)
    end = blocks.num_blocks * window_size + (0 if is_causal else unit)

    def near(z: Tensor) -> Tensor:  # [..., tokens, dim] -> [..., blocks, slots, dim]
        padded = pad_tokens(z, unit, end - num_tokens)
        return padded.unfold(-2, slots, window_size).transpose(-1, -2)

    real = torch.ones_like(tokens.y[:1, :1, :, :1]) if key_visible is None else key_visible.to(tokens.y)
    seen = (near(real) > 0).transpose(-1, -2)
    if is_causal:
        seen = seen & causal_visibility(window_size, slots, seen.device)
    partials = [exact_partial(blocks.split(tokens.x), near(tokens.y), near(tokens.value), seen)]

    key = key.masked(key_visible).map_tokens(units.split).masked(_real(tokens, None, units.split))
    query, extra = query.map_tokens(blocks.split), None if extra is None else blocks.split(extra)
    partials.append(query.inter_block(key, units.split(tokens.value), reach, extra=extra, dropout=dropout))
    return _joined(merge_states(partials), blocks.join)


def _real(tokens: Tokens, key_visible: Tensor | None, split: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Which places of the blocks hold a key to read, `[batch or 1, heads or 1, ..., 1]`; `None` if all do."""
    real = tokens.y.new_ones(1, 1, tokens.y.shape[2], 1) if key_visible is None else key_visible.to(tokens.y)
    places = split(real)
    if key_visible is None and places.shape[-3] * places.shape[-2] == tokens.y.shape[2]:
        return None
    return places > 0


def _joined(partial: AttentionState, join: Callable[[Tensor], Tensor]) -> AttentionState:
    return AttentionState(join(partial.output), join(partial.lse.unsqueeze(-1)).squeeze(-1))


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise `InputError` unless `chunk_size` is `None` or a power of two."""
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise InputError(f"chunk_size must be a power of two, or None; got {chunk_size!r}.")
