r"""FAVOR and LARA token by token: the slots of all tokens that have left the window, and the tokens that have not.

A query reads the keys of its window exactly and everything before through the slots' values `u` and log-sum-exps `b`,
under one softmax. When a block of keys has left the window the slots take it in by a merge, which is exact: what comes
out is what the parallel form gives on the whole sequence, up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.attention_state import AttentionState, merge_states
from ...kernels.backends import current_backend
from ...kernels.decode import decode_step
from ..inputs import prepare_tokens
from ..linear_weights import LinearSlotWeights
from ..noise import with_noise
from ..precision import compute_dtype
from ..slot_attention import SlotOptions, exact_attention
from ..slot_weights import FeatureMap, SlotWeights, dropped_from
from ..softmax import softmax_with_lse, without_empty
from .window_tokens import WindowShape, WindowTokens


@dataclass(frozen=True)
class SlotState:
    """What is kept of the tokens seen so far.

    Args:
        window: The tokens of the window.
        slots: What slots have read of all others, `[batch, heads, slots(, head_dim)]`, in at least float32.
    """

    window: WindowTokens
    slots: AttentionState

    def rows(self, index: Tensor) -> SlotState:
        """Pick rows, as beam search does."""
        return SlotState(self.window.rows(index), AttentionState(*(z.index_select(0, index) for z in self.slots)))


@dataclass(frozen=True)
class SlotRecurrence:
    """Causal attention through slots, a piece at a time. No method changes the state it is given.

    Args:
        feature_map: Of the layer. num_slots: How many slots it has.
        scaling: Factor of the dot product.
        options: As in `exact_attention`.
        in_half: Types of devices on which many tokens are computed in half precision.
    """

    feature_map: FeatureMap
    num_slots: int
    scaling: float
    options: SlotOptions
    in_half: tuple[str, ...] = ()

    keeps_queries: ClassVar[bool] = False

    @property
    def window_shape(self) -> WindowShape:
        return WindowShape(self.options.window_size, self.options.overlap_window)

    def start(self, key: Tensor, value: Tensor, *, static_tokens: int | None = None) -> SlotState:
        """The state before the first token, for keys and values like these; `static_tokens` for static shapes."""
        wide = torch.promote_types(torch.promote_types(key.dtype, value.dtype), torch.float32)
        shape = (*key.shape[:2], self.num_slots)
        slots = AttentionState(
            value.new_zeros(*shape, value.shape[-1], dtype=wide), value.new_full(shape, float("-inf"), dtype=wide)
        )
        places = None if static_tokens is None else self.window_shape.places
        return SlotState(WindowTokens.empty(key, value, static_places=places), slots)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, state: SlotState) -> Tensor:
        """What the last tokens read, in the parallel form.

        Args:
            query: `[batch, heads, queries, head_dim]`, the last of the new tokens.
            key, value: `[batch, heads, tokens, head_dim]`, all new tokens. key_mask: `[batch, tokens]`.
        Returns: `[batch, heads, queries, head_dim]`, dtype of `query`.
        """
        joined = state.window.join(None, key, value, key_mask)
        dtype = compute_dtype(query, joined.key, joined.value, self.in_half)
        query, dtype_out = query.to(dtype), query.dtype
        key, value = joined.key.to(dtype), joined.value.to(dtype)
        tokens = prepare_tokens(query, key, value, joined.mask, scaling=self.scaling, is_causal=True)
        query_weights, key_weights = self._query_weights(tokens.query), self.feature_map.key_weights(tokens.key)
        slots = AttentionState(state.slots.output.to(dtype), state.slots.lse)
        dropout = with_noise(self.options.dropout, tokens.query) or 0.0
        new = exact_attention(tokens, self.options._replace(dropout=dropout)).with_slots(query_weights, key_weights)
        dropped = dropped_from(query_weights, dropout, tokens.query)  # the same as among the new tokens
        earlier = query_weights.add_token_bias(query_weights.read(slots, dropped=dropped))
        return tokens.finish(without_empty(merge_states([new, earlier]))).to(dtype_out)

    def absorb(
        self, query: Tensor | None, key: Tensor, value: Tensor, key_mask: Tensor | None, state: SlotState
    ) -> SlotState:
        """The state after these tokens as well."""
        passed, window = state.window.move_on(query, key, value, key_mask, self.window_shape)
        slots = state.slots
        if passed.key.shape[2]:
            slots = self._take_in(slots, passed.key, passed.value, passed.mask)
        return SlotState(window, slots)

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, state: SlotState, valid: Tensor | None = None
    ) -> tuple[Tensor, SlotState]:
        """One token of every row, `[batch, heads, 1, head_dim]`: `attend` and `absorb` in a few operations.

        Args:
            valid: `[batch]`, False for a row whose token is padding; static shapes only.
        """
        dtype = compute_dtype(query, key, value)
        if valid is not None:  # inf or NaN in the padding must not get into the state
            real = valid[:, None, None, None]
            query, key, value = (z.masked_fill(~real, 0.0) for z in (query, key, value))
        query_weights = self._query_weights(query.to(dtype) * self.scaling**0.5)
        if not self.options.window_size:
            output, slots = self._through_slots(query_weights, key.to(dtype), value.to(dtype), state.slots, valid)
            state = SlotState(state.window, slots)
        else:
            window = state.window.append(None, key, value, valid)
            logits = window.logits(query.to(dtype) * self.scaling)
            output = _read(logits, window.value.to(dtype), _dense(query_weights), state.slots)
            state = self._pass_block(SlotState(window, state.slots))
        if valid is not None:
            output = output.masked_fill(~valid[:, None, None, None], 0.0)
        return output.to(query.dtype), state

    def _query_weights(self, query: Tensor) -> SlotWeights:
        """Log-weights of scaled queries, up to a factor of their own where all that they read are slots."""
        query_weights = self.feature_map.query_weights(query)
        return query_weights if self.options.window_size else query_weights.without_token_bias()

    def _take_in(self, slots: AttentionState, key: Tensor, value: Tensor, mask: Tensor | None) -> AttentionState:
        """Slots with more keys in them."""
        dtype = compute_dtype(key, key, value, self.in_half)
        weights = self.feature_map.key_weights(key.to(dtype) * self.scaling**0.5)
        weights = weights.masked(None if mask is None else mask[:, None, :, None])
        return merge_states([slots, weights.summarise(value.to(dtype))])

    def _pass_block(self, state: SlotState) -> SlotState:
        """Move the first block from the window to the slots, in those rows where it has left the window."""
        window, slots, size = state.window, state.slots, self.options.window_size
        rows = window.full(self.window_shape)
        if rows is not None and not rows:
            return state
        key, value = window.key[:, :, :size], window.value[:, :, :size]
        if rows is None:  # static shapes: all rows, those that are not full with weight 0
            full = (window.count() == self.window_shape.places)[:, None].expand(-1, size)
            slots = self._take_in(slots, key, value, full)
        elif len(rows) == key.shape[0]:
            slots = self._take_in(slots, key, value, None)
        else:
            index = torch.tensor(rows, device=key.device)
            some = self._take_in(AttentionState(*(z[index] for z in slots)), key[index], value[index], None)
            slots = AttentionState(*(z.index_copy(0, index, new) for z, new in zip(slots, some, strict=True)))
        return SlotState(window.drop(self.window_shape), slots)

    def _through_slots(
        self, query_weights: SlotWeights, key: Tensor, value: Tensor, slots: AttentionState, valid: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        """Without a window: the token joins the slots, then reads them."""
        key_weights = self.feature_map.key_weights(key * self.scaling**0.5)
        key_weights = key_weights.masked(None if valid is None else valid[:, None, None, None])
        on_triton = value.is_cuda or current_backend() == "triton"
        if on_triton and isinstance(query_weights, LinearSlotWeights) and isinstance(key_weights, LinearSlotWeights):
            done = decode_step(query_weights.slot_inputs(key_weights, value), slots)
            return done.output, done.state
        own = AttentionState(value.to(slots.output.dtype).expand_as(slots.output), _dense(key_weights).squeeze(-2))
        slots = merge_states([slots, own])
        return softmax_with_lse(_dense(query_weights) + slots.lse.unsqueeze(-2), slots.output).output, slots


def _read(logits: Tensor, value: Tensor, slot_logits: Tensor, slots: AttentionState) -> Tensor:
    """The window's keys and the slots under one softmax: `[batch, heads, 1, head_dim]`."""
    slot_logits = slot_logits + slots.lse.unsqueeze(-2)
    top = torch.maximum(logits.amax(-1, keepdim=True), slot_logits.amax(-1, keepdim=True))
    top = top.clamp_min(torch.finfo(top.dtype).min)
    exact, through_slots = (logits - top).exp(), (slot_logits - top).exp()
    total = exact.sum(-1, keepdim=True) + through_slots.sum(-1, keepdim=True)
    return (exact @ value + through_slots @ slots.output) / total.masked_fill(total == 0, 1.0)


def _dense(weights: SlotWeights) -> Tensor:
    """`weights.dense()` of a few tokens, without a copy of the slots for every row of the batch."""
    if isinstance(weights, LinearSlotWeights) and weights.tokens.shape[0] > 1 and weights.slots.ndim > 2:
        lead = weights.slots.shape[:-3]
        if not lead or lead[0] == 1:
            slots = weights.slots.reshape(weights.slots.shape[-3:]).to(weights.tokens.dtype)
            products = torch.einsum("bhtd,hmd->bhtm", weights.tokens, slots)
            return products + weights.token_bias + weights.slot_bias.unsqueeze(-2)
    return weights.dense()
