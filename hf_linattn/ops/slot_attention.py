"""Attention through slots beside exact keys (a local window, heavy keys), and causal: what FAVOR and LARA share.

Queries read the exact keys first (`exact_attention`), then all others through slots (`ExactAttention.with_slots`),
under one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..kernels.attend import attend
from ..kernels.attention_state import AttentionState, merge_states
from ..kernels.block_slots import BlockReach
from .ablation import ABLATED, SHUFFLED_SLOTS, SLOT_SHARE, WINDOW_ALONE, current_ablations
from .dense_slots import between_halves
from .heavy_keys import heavy_keys
from .inputs import check_causal
from .layout import Blocks, WindowedBlocks, fit_window
from .noise import Dropped, SlotDropout
from .padding import Tokens, without_padding
from .slot_weights import FeatureMap, SlotWeights, dropped_from
from .softmax import causal_visibility

# Measured on a CPU core with 256 slots (experiments/README.md): tokens of a chunk that read each other one by one
# (causal, no window), and up to how many tokens small windows form a group with one state of its slots.
_CAUSAL_CHUNK = 64
_WINDOW_CHUNK = 32


class SlotOptions(NamedTuple):
    """Options of attention through slots.

    window_size: Tokens of a block (side of a square with a grid), which its queries see exactly; 0 for none.
    overlap_window: A query also sees half a block to each side of its own exactly (causal: the whole block before).
        Sequences only.
    num_heavy_keys: That many keys of the row are seen exactly by every query (bidirectional only).
    chunk_size: Up to this many tokens, a power of two, blocks that are close read each other without a state of their
        slots; changes the cost, not the result. `None`: what was measured to be fast.
    dropout: Probability of dropping a slot from a query's weights, perhaps with where the decisions come from.
    """

    is_causal: bool
    window_size: int = 0
    overlap_window: bool = False
    num_heavy_keys: int = 0
    chunk_size: int | None = None
    dropout: float | SlotDropout = 0.0

    def window(self, num_global_tokens: int, grid: tuple[int, int] | None) -> dict[str, Any]:
        """Arguments of `in_one_window`."""
        return {
            "window_size": self.window_size,
            "overlap_window": self.overlap_window,
            "is_causal": self.is_causal,
            "num_global_tokens": num_global_tokens,
            "grid": grid,
        }

    def check(self, grid: tuple[int, int] | None) -> None:
        """Raise InputError or UnsupportedError for options that are impossible or do not go together."""
        chunk_size = self.chunk_size
        if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
            raise InputError(f"chunk_size must be a power of two, or None; got {chunk_size!r}.")
        if self.is_causal:
            check_causal(num_global_tokens=0, num_heavy_keys=self.num_heavy_keys)
        if not self.overlap_window:
            return
        if self.window_size < 2 or self.window_size % 2:
            raise InputError(f"overlap_window=True needs an even window_size >= 2; got {self.window_size!r}.")
        if grid is not None:
            raise UnsupportedError(
                f"overlap_window=True works on sequences here, not on a grid; got grid={grid!r}. EVA has overlapping"
                " windows on grids; otherwise use overlap_window=False with a larger window_size."
            )


@dataclass(frozen=True)
class ExactAttention:
    """What queries have read exactly, of heavy keys and of the keys in their windows (`exact_attention`).

    Args:
        heavy: What they have read of heavy keys; `None` without.
        windows: What they have read in windows; `None` without.
        visible: The keys that are not heavy, `[batch, heads or 1, tokens, 1]`; `None` for all.
    """

    tokens: Tokens
    options: SlotOptions
    heavy: AttentionState | None
    windows: Windows | None
    visible: Tensor | None

    def with_slots(
        self, query_weights: SlotWeights, key_weights: SlotWeights, slot_numbers: Tensor | None = None
    ) -> AttentionState:
        """These keys, and the others (of these the earlier ones if causal) through slots: no key counts twice.

        Args:
            query_weights, key_weights: Log-weights `a[t, j]` and `c[j, n]`. With a window, heavy or global tokens they
                must be on the scale of `x . y`, constants included.
            slot_numbers: As in `dropped_from`.
        Returns: output `[batch, heads, tokens, head_dim]` and its log-sum-exp.
        Cost: O(tokens * slots * head_dim) time; with blocks of size L also (tokens / L) * slots * head_dim memory.
        """
        exact = self
        if ABLATED:
            exact, query_weights = _ablated(self, query_weights)
        value, options = exact.tokens.value, exact.options
        dropped = None
        if options.dropout:
            dropped = dropped_from(query_weights, options.dropout, exact.tokens.query, slot_numbers=slot_numbers)
        if exact.windows is not None:
            state = exact.windows.with_slots(query_weights, key_weights, options, dropped)
        elif options.is_causal:
            chunk = min(options.chunk_size or _CAUSAL_CHUNK, 1 << (value.shape[2] - 1).bit_length())
            state = query_weights.causal(key_weights.masked(exact.visible), value, chunk, dropped)
            state = query_weights.add_token_bias(state)
        else:
            slots = key_weights.masked(exact.visible).summarise(value)
            state = query_weights.add_token_bias(query_weights.read(slots, dropped=dropped))
        return state if exact.heavy is None else merge_states([exact.heavy, state])


def exact_attention(tokens: Tokens, options: SlotOptions) -> ExactAttention:
    """Queries read the keys in their windows and the heavy keys, if there are any.

    Args:
        options: Some that `SlotOptions.check` lets pass.
    Cost: O(tokens * (window_size + num_heavy_keys) * head_dim) time; memory is that of the output.
    """
    heavy, visible = None, tokens.visible
    if options.num_heavy_keys:
        heavy, visible = heavy_keys(tokens, options.num_heavy_keys)
    windows = None
    if options.window_size:
        overlap = options.overlap_window and options.window_size < tokens.key.shape[2]
        windows = (_overlapping_windows if overlap else _disjoint_windows)(tokens, visible, options)
    return ExactAttention(tokens, options, heavy, windows, visible)


def slots_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    key_mask: Tensor | None,
    is_cross: bool,
    dropout: float | SlotDropout,
) -> Tensor:
    """Bidirectional, with nothing exact: queries and keys of any number, of one sequence or (`is_cross`) of two."""
    is_self, visible = query.shape[2] == key.shape[2] and not is_cross, None
    if key_mask is not None:
        # Before anything is computed, so that inf or NaN in the padding reaches neither values nor gradients.
        visible = key_mask[:, None, :, None]
        key, value = without_padding(key, value, key_mask)
        query = query.masked_fill(~visible, 0.0) if is_self else query
    query_weights = feature_map.query_weights(query)
    if ABLATED:
        query_weights, value = _ablated_alone(query_weights, value)
    slots = feature_map.key_weights(key).masked(visible).without_common_factor().summarise(value)
    dropped = None
    if dropout:
        position = None if key_mask is None or not is_self else (key_mask.long().cumsum(-1) - 1).clamp_min(0)
        dropped = dropped_from(query_weights, dropout, query, position)
    output = query_weights.read(slots, dropped=dropped).output
    return output.masked_fill(~visible, 0.0) if is_self and visible is not None else output


@dataclass(frozen=True)
class Windows:
    """Queries in blocks, with what they have read of the keys in their windows.

    Args:
        blocks: How queries are cut. units: How keys are cut that blocks read through slots; `reach` says which.
        state: What the queries have read, `[batch, heads, groups, queries of a group(, head_dim)]`.
        value: `[batch, heads, groups of units, keys of a group, head_dim]`.
        real: Which places of the units hold a key to read, `[batch or 1, heads or 1, ..., 1]`; `None` if all do.
    """

    blocks: Blocks
    units: Blocks
    reach: BlockReach
    state: AttentionState
    value: Tensor
    real: Tensor | None

    def with_slots(
        self, query_weights: SlotWeights, key_weights: SlotWeights, options: SlotOptions, dropped: Dropped | None
    ) -> AttentionState:
        """The same with the keys outside of the windows, through slots.

        Within groups of windows (`chunk_size` tokens) the windows read each other directly, halves of a pair at a
        time; between groups every group's slots are summarised on their own and merged.
        """
        blocks, state, through_slots = self.blocks, self.state, []
        query_weights = query_weights.map_tokens(blocks.split)
        key_weights = key_weights.map_tokens(self.units.split).masked(self.real)
        if dropped is not None:
            dropped = dropped._replace(mask=blocks.split(dropped.mask))
        if blocks.per_group > 1:
            logits = query_weights.without_token_bias().dense(), key_weights.dense()
            half = blocks.members
            while half < blocks.per_group * blocks.members:
                halves = between_halves(*logits, self.value, half, is_causal=options.is_causal, dropped=dropped)
                through_slots.append(halves)
                half *= 2
        if blocks.num_groups > 1:
            through_slots.append(query_weights.inter_block(key_weights, self.value, self.reach, dropped))
        if through_slots:
            state = merge_states([state, query_weights.add_token_bias(merge_states(through_slots))])
        return AttentionState(blocks.join(state.output), blocks.join(state.lse.unsqueeze(-1)).squeeze(-1))


def _disjoint_windows(tokens: Tokens, visible: Tensor | None, options: SlotOptions) -> Windows:
    """A query sees its own window. Small windows form groups, whose slots are summarised together."""
    num_tokens, grid = tokens.key.shape[2], tokens.grid
    size = fit_window(options.window_size, num_tokens, grid)
    windows = Blocks(num_tokens, size, grid)
    members, count = windows.members, windows.num_blocks
    together = min((options.chunk_size or _WINDOW_CHUNK) // members, 1 << (count - 1).bit_length())
    per_group = 1 << max(0, together.bit_length() - 1)
    groups = windows if per_group == 1 else Blocks(num_tokens, size, grid, per_group)
    shape = (per_group, members)

    real, value = _real_keys(tokens, visible, groups), groups.split(tokens.value)
    seen = None if real is None else real.squeeze(-1).unflatten(-1, shape).unsqueeze(-2)
    if options.is_causal:
        earlier = causal_visibility(members, members, value.device)
        seen = earlier if seen is None else seen & earlier
    query = groups.split(tokens.query).unflatten(-2, shape)
    key = groups.split(tokens.key).unflatten(-2, shape)
    read = attend(query, key, value.unflatten(-2, shape), visible=seen)
    state = AttentionState(read.output.flatten(-3, -2), read.lse.flatten(-2, -1))
    return Windows(groups, groups, BlockReach(is_causal=options.is_causal), state, value, real)


def _overlapping_windows(tokens: Tokens, visible: Tensor | None, options: SlotOptions) -> Windows:
    """Windows that reach beyond their blocks, to the border of a unit: slots are summarised per unit.

    Bidirectional: a unit is half a block, and block t sees units `2t - 1 .. 2t + 2`. Causal: a unit is a block, and
    block t sees units `t - 1` and `t`.
    """
    num_tokens, is_causal = tokens.key.shape[2], options.is_causal
    reach = BlockReach(1, 1, True) if is_causal else BlockReach(2, 1, False)
    unit = options.window_size // reach.units
    blocks, units = Blocks(num_tokens, options.window_size), Blocks(num_tokens, unit)
    around = WindowedBlocks(blocks, unit, 0 if is_causal else unit)

    real = tokens.key.new_ones(1, 1, num_tokens, 1) if visible is None else visible.to(tokens.key)
    seen = (around.split(real) > 0).transpose(-1, -2)
    if is_causal:
        seen = seen & causal_visibility(blocks.size, seen.shape[-1], seen.device)
    state = attend(blocks.split(tokens.query), around.split(tokens.key), around.split(tokens.value), visible=seen)
    return Windows(blocks, units, reach, state, units.split(tokens.value), _real_keys(tokens, visible, units))


def _real_keys(tokens: Tokens, visible: Tensor | None, blocks: Blocks) -> Tensor | None:
    """Which places of the blocks hold a key to read, `[batch or 1, heads or 1, ..., 1]`; `None` if all do."""
    if visible is not None:
        return blocks.split(visible.to(tokens.key)) > 0
    return None if blocks.is_whole else blocks.split(tokens.key.new_ones(1, 1, blocks.tokens, 1)) > 0


# -- of which a part is taken away (ops/ablation.py) -----------------------------------------------------------------
def _ablated(exact: ExactAttention, query_weights: SlotWeights) -> tuple[ExactAttention, SlotWeights]:
    """What stands in place of exact keys and of the queries' weights for slots."""
    names = current_ablations()
    if SHUFFLED_SLOTS in names:
        query_weights = query_weights.shuffled()
    if WINDOW_ALONE in names:
        query_weights = query_weights.without_mass()
    if SLOT_SHARE in names:
        tokens, windows, heavy = exact.tokens, exact.windows, exact.heavy
        if windows is not None:
            windows = replace(windows, state=_valued(windows.state, 0.0), value=torch.ones_like(windows.value))
        heavy = None if heavy is None else _valued(heavy, 0.0)
        tokens = replace(tokens, value=torch.ones_like(tokens.value))
        exact = replace(exact, tokens=tokens, windows=windows, heavy=heavy)
    return exact, query_weights


def _ablated_alone(query_weights: SlotWeights, value: Tensor) -> tuple[SlotWeights, Tensor]:
    """The same without exact keys: what stands in place of the queries' weights and of the values."""
    names = current_ablations()
    query_weights = query_weights.shuffled() if SHUFFLED_SLOTS in names else query_weights
    return query_weights, torch.ones_like(value) if SLOT_SHARE in names else value


def _valued(state: AttentionState, value: float) -> AttentionState:
    return AttentionState(torch.full_like(state.output, value), state.lse)
