r"""FAVOR and LARA token by token: the slots of all tokens that have left the window, and the tokens that have not.

A query reads the keys near it exactly and everything before through the slots' values `u` and log-sum-exps `b`, under
one softmax. When a block of keys has left the window the slots take it in by a merge, which is exact: what comes out
is what the parallel form gives on the whole sequence, up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.attention_state import AttentionState, merge_states
from ...kernels.decode import decode_step
from ...kernels.operators import current_backend
from ..inputs import compute_dtype, prepare_tokens
from ..slot_attention import SlotOptions, exact_attention
from ..slot_weights import FeatureMap, LinearSlotWeights, SlotWeights
from ..softmax import mask_logits, softmax_with_lse, without_empty
from .window_tokens import Window, WindowTokens


@dataclass(frozen=True)
class SlotState:
    """What is kept of the tokens seen so far.

    Args:
        near: The tokens of the window.
        far: The slots of all others, `[batch, heads, slots(, head_dim)]`, in at least float32.
    """

    near: WindowTokens
    far: AttentionState

    def rows(self, index: Tensor) -> SlotState:
        """Pick rows, as beam search does."""
        return SlotState(self.near.rows(index), AttentionState(*(z.index_select(0, index) for z in self.far)))


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
    def window(self) -> Window:
        return Window(self.options.window_size, self.options.overlap_window)

    def start(self, key: Tensor, value: Tensor, *, static_tokens: int | None = None) -> SlotState:
        """The state before the first token, for keys and values like these; `static_tokens` for static shapes."""
        wide = torch.promote_types(torch.promote_types(key.dtype, value.dtype), torch.float32)
        shape = (*key.shape[:2], self.num_slots)
        far = AttentionState(
            value.new_zeros(*shape, value.shape[-1], dtype=wide), value.new_full(shape, float("-inf"), dtype=wide)
        )
        places = None if static_tokens is None else self.window.places
        return SlotState(WindowTokens.empty(key, value, static_places=places), far)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, state: SlotState) -> Tensor:
        """What the last tokens read, in the parallel form.

        Args:
            query: `[batch, heads, queries, head_dim]`, the last of the new tokens.
            key, value: `[batch, heads, tokens, head_dim]`, all new tokens. key_mask: `[batch, tokens]`.
        Returns: `[batch, heads, queries, head_dim]`, dtype of `query`.
        """
        joined = state.near.join(None, key, value, key_mask)
        dtype = compute_dtype(query, joined.key, joined.value, self.in_half)
        query, dtype_out = query.to(dtype), query.dtype
        key, value = joined.key.to(dtype), joined.value.to(dtype)
        tokens = prepare_tokens(query, key, value, joined.mask, scaling=self.scaling, is_causal=True)
        query_weights, key_weights = self._query_weights(tokens.query), self.feature_map.key_weights(tokens.key)
        far = AttentionState(state.far.output.to(dtype), state.far.lse)
        read = merge_states(
            [
                exact_attention(tokens, self.options).with_slots(query_weights, key_weights),
                query_weights.add_token_bias(query_weights.read(far, dropout=self.options.dropout)),
            ]
        )
        return tokens.finish(without_empty(read)).to(dtype_out)

    def absorb(
        self, query: Tensor | None, key: Tensor, value: Tensor, key_mask: Tensor | None, state: SlotState
    ) -> SlotState:
        """The state after these tokens as well."""
        passed, near = state.near.move_on(query, key, value, key_mask, self.window)
        if not passed.key.shape[2]:
            return SlotState(near, state.far)
        return SlotState(near, self._take_in(state.far, passed.key, passed.value, passed.mask))

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
            output, far = self._through_slots(query_weights, key.to(dtype), value.to(dtype), state.far, valid)
            state = SlotState(state.near, far)
        else:
            near = state.near.append(None, key, value, valid)
            logits = (query.to(dtype) * self.scaling) @ near.key.to(dtype).transpose(-1, -2)
            mask = near.mask()
            near_logits = mask_logits(logits, None if mask is None else mask[:, None, None])
            output = _read(near_logits, near.value.to(dtype), _dense(query_weights), state.far)
            state = self._pass_block(SlotState(near, state.far))
        if valid is not None:
            output = output.masked_fill(~valid[:, None, None, None], 0.0)
        return output.to(query.dtype), state

    def _query_weights(self, query: Tensor) -> SlotWeights:
        """Log-weights of scaled queries, up to a factor of their own where all that they read are slots."""
        query_weights = self.feature_map.query_weights(query)
        return query_weights if self.options.window_size else query_weights.without_token_bias()

    def _take_in(self, far: AttentionState, key: Tensor, value: Tensor, mask: Tensor | None) -> AttentionState:
        """Slots with more keys in them."""
        dtype = compute_dtype(key, key, value, self.in_half)
        weights = self.feature_map.key_weights(key.to(dtype) * self.scaling**0.5)
        weights = weights.masked(None if mask is None else mask[:, None, :, None])
        return merge_states([far, weights.summarise(value.to(dtype))])

    def _pass_block(self, state: SlotState) -> SlotState:
        """Move the first block of those rows where it has left the window from the near tokens to the slots."""
        near, far, size = state.near, state.far, self.options.window_size
        rows = near.full(self.window)
        if rows is not None and not rows:
            return state
        key, value = near.key[:, :, :size], near.value[:, :, :size]
        if rows is None:  # static shapes: all rows, those that are not full with weight 0
            full = (near.count() == self.window.places)[:, None].expand(-1, size)
            far = self._take_in(far, key, value, full)
        elif len(rows) == key.shape[0]:
            far = self._take_in(far, key, value, None)
        else:
            index = torch.tensor(rows, device=key.device)
            some = self._take_in(AttentionState(*(z[index] for z in far)), key[index], value[index], None)
            far = AttentionState(*(z.index_copy(0, index, new) for z, new in zip(far, some, strict=True)))
        return SlotState(near.drop(self.window, rows), far)

    def _through_slots(
        self, query_weights: SlotWeights, key: Tensor, value: Tensor, far: AttentionState, valid: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        """Without a window: the token joins the slots, then reads them."""
        key_weights = self.feature_map.key_weights(key * self.scaling**0.5)
        key_weights = key_weights.masked(None if valid is None else valid[:, None, None, None])
        on_triton = value.is_cuda or current_backend() == "triton"
        if on_triton and isinstance(query_weights, LinearSlotWeights) and isinstance(key_weights, LinearSlotWeights):
            done = decode_step(query_weights.slot_inputs(key_weights, value), far)
            return done.output, done.state
        own = AttentionState(value.to(far.output.dtype).expand_as(far.output), _dense(key_weights).squeeze(-2))
        far = merge_states([far, own])
        read = softmax_with_lse(_dense(query_weights) + far.lse.unsqueeze(-2), far.output)
        return read.output, far


def _read(near_logits: Tensor, near_value: Tensor, slot_logits: Tensor, far: AttentionState) -> Tensor:
    """Near keys and slots under one softmax: `[batch, heads, 1, head_dim]`."""
    slot_logits = slot_logits + far.lse.unsqueeze(-2)
    top = torch.maximum(near_logits.amax(-1, keepdim=True), slot_logits.amax(-1, keepdim=True))
    top = top.clamp_min(torch.finfo(top.dtype).min)
    near, slots = (near_logits - top).exp(), (slot_logits - top).exp()
    total = near.sum(-1, keepdim=True) + slots.sum(-1, keepdim=True)
    return (near @ near_value + slots @ far.output) / total.masked_fill(total == 0, 1.0)


def _dense(weights: SlotWeights) -> Tensor:
    """`weights.dense()` of a few tokens, without a copy of the slots for every row of the batch."""
    if isinstance(weights, LinearSlotWeights) and weights.tokens.shape[0] > 1 and weights.slots.ndim > 2:
        lead = weights.slots.shape[:-3]
        if not lead or lead[0] == 1:
            slots = weights.slots.reshape(weights.slots.shape[-3:]).to(weights.tokens.dtype)
            products = torch.einsum("bhtd,hmd->bhtm", weights.tokens, slots)
            return products + weights.token_bias + weights.slot_bias.unsqueeze(-2)
    return weights.dense()
