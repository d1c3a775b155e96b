"""The softmaxes of `slots.py` when their logits are dot products: no logits are kept for the backward pass.

Log-weights of tokens and slots are linear in the token, `a[t, j] = x_t . w_j + r_t + e_j`. Then `r_t` only shifts the
mass of a softmax over slots, and `e_j` that of one over tokens: both are a softmax of dot products with a bias per
member, `kernels.attend`, whose memory is that of its inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..kernels.attend import attend
from ..kernels.attention_state import AttentionState, merge_states
from ..kernels.block_slots import BlockReach, inter_block_attention
from ..kernels.causal_slots import causal_slot_attention
from ..kernels.slot_inputs import SlotInputs
from .layout import Blocks
from .slots import between_halves, own_key, softmax_with_lse, states_around

if TYPE_CHECKING:
    from typing_extensions import Self


class SlotWeights(Protocol):
    """Log-weights of tokens for slots, whatever they are a function of: what attention through slots asks of them."""

    def dense(self) -> Tensor:
        """`[batch, heads, ..., tokens, slots]`."""

    def map_tokens(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Rearrange the tokens: `fn` gets `[batch, heads, tokens, dim]`."""

    def masked(self, visible: Tensor | None) -> Self:
        """Weight 0 for tokens where `visible` (`[batch, 1 or heads, ..., tokens, 1]`) is False."""

    def unbiased(self) -> Self:
        """Without the factors that belong to a token alone: they do not change what queries read through slots."""

    def biased(self, read: AttentionState) -> AttentionState:
        """What the queries `self.unbiased()` have read, with the log mass of `self`.

        Put on last: added to every logit, minus half the squared length of a query is all that rounding leaves of it.
        """

    def summarise(self, values: Tensor) -> AttentionState:
        """Every slot reads all tokens: output `[batch, heads, ..., slots, head_dim]`, log_mass `[..., slots]`."""

    def read(self, slots: AttentionState, *, extra: Tensor | None = None, dropout: float = 0.0) -> AttentionState:
        """Every token reads all slots. `extra` is added to the log-weights, `[batch, heads, ..., tokens, slots]`."""

    def inter_block(
        self, key: Self, value: Tensor, reach: BlockReach, *, extra: Tensor | None = None, dropout: float = 0.0
    ) -> AttentionState:
        """Blocks of queries (`self`) read the units of keys that they reach, through slots.

        Tokens are `[batch, heads, blocks, tokens of a block, ...]`, values `[batch, heads, units, keys, head_dim]`.
        """

    def causal(
        self, key: Self, value: Tensor, *, chunk: int, extra: Tensor | None = None, dropout: float = 0.0
    ) -> AttentionState:
        """Queries (`self`) read all keys up to themselves, those of their chunk one by one (a power of 2)."""


@dataclass(frozen=True)
class LinearSlotWeights:
    """`a[t, j] = token_t . slot_j + token_bias_t + slot_bias_j`.

    tokens: `[batch, heads, ..., tokens, dim]`; token_bias: `[batch, heads, ..., tokens, 1]`.
    slots: `[heads, slots, dim]` or `[batch, heads, slots, dim]`, with dimensions of 1 where tokens have more of them.
    slot_bias: The same without `dim`.
    """

    tokens: Tensor
    token_bias: Tensor
    slots: Tensor
    slot_bias: Tensor

    def dense(self) -> Tensor:
        """`[batch, heads, ..., tokens, slots]`."""
        tokens, slots = (z.to(self.token_bias.dtype) for z in (self.tokens, self.slots))
        return tokens @ slots.transpose(-1, -2) + self.token_bias + self.slot_bias.unsqueeze(-2)

    def map_tokens(self, fn: Callable[[Tensor], Tensor]) -> LinearSlotWeights:
        """Rearrange the tokens: `fn` gets `[batch, heads, tokens, dim]`, also for the bias (`dim` 1)."""
        tokens, bias = fn(self.tokens), fn(self.token_bias)
        extra = tokens.ndim - self.tokens.ndim
        slots, slot_bias = self.slots, self.slot_bias
        for _ in range(extra):
            slots, slot_bias = slots.unsqueeze(-3), slot_bias.unsqueeze(-2)
        return LinearSlotWeights(tokens, bias, slots, slot_bias)

    def masked(self, visible: Tensor | None) -> LinearSlotWeights:
        """Weight 0 for tokens where `visible` (`[batch, 1, ..., tokens, 1]`) is False."""
        if visible is None:
            return self
        bias = self.token_bias.masked_fill(~visible, float("-inf"))
        return LinearSlotWeights(self.tokens, bias, self.slots, self.slot_bias)

    def unbiased(self) -> LinearSlotWeights:
        """Without `token_bias`."""
        return replace(self, token_bias=torch.zeros_like(self.token_bias))

    def biased(self, read: AttentionState) -> AttentionState:
        """What the queries `self.unbiased()` have read, with the log mass of `self`."""
        return AttentionState(read.output, read.lse + self.token_bias.squeeze(-1))

    def levelled(self) -> LinearSlotWeights:
        """Without the largest factor of a token, which all slots have in common: for keys beside no exact ones."""
        largest = self.token_bias.detach().amax(-2, keepdim=True)
        bias = self.token_bias - largest.clamp_min(torch.finfo(largest.dtype).min)
        return replace(self, token_bias=bias)

    def summarise(self, values: Tensor) -> AttentionState:
        """Every slot reads all tokens: output `[batch, heads, ..., slots, head_dim]`, log_mass `[..., slots]`."""
        state = attend(self.slots, self.tokens, values, bias=self.token_bias.squeeze(-1))
        return AttentionState(state.output, state.lse + self.slot_bias)

    def read(self, slots: AttentionState, *, extra: Tensor | None = None, dropout: float = 0.0) -> AttentionState:
        """Every token reads all slots. `extra` is added to the log-weights, `[batch, heads, ..., tokens, slots]`."""
        if extra is not None or dropout:
            logits = self.unbiased().dense() + slots.lse.unsqueeze(-2)
            return self.biased(
                softmax_with_lse(logits if extra is None else logits + extra, slots.output, dropout=dropout)
            )
        return self.biased(attend(self.tokens, self.slots, slots.output, bias=slots.lse + self.slot_bias))

    def slot_inputs(self, key: LinearSlotWeights, value: Tensor) -> SlotInputs:
        """Queries (`self`), keys and values, for the kernels of attention through slots."""
        maps = (self.slots, self.slot_bias, key.slots, key.slot_bias)
        if self.tokens.ndim > 4:  # blocks of tokens, which share their slots
            maps = (maps[0].squeeze(-3), maps[1].squeeze(-2), maps[2].squeeze(-3), maps[3].squeeze(-2))
        return SlotInputs(self.tokens, *maps[:2], key.tokens, key.token_bias.squeeze(-1), *maps[2:], value)

    def inter_block(
        self,
        key: LinearSlotWeights,
        value: Tensor,
        reach: BlockReach,
        *,
        extra: Tensor | None = None,
        dropout: float = 0.0,
    ) -> AttentionState:
        """Blocks of queries (`self`) read the units of keys that they reach, through slots."""
        if extra is not None or dropout:
            return self.biased(inter_block_dense(self.unbiased(), key, value, reach, extra=extra, dropout=dropout))
        return self.biased(inter_block_attention(self.slot_inputs(key, value), reach))

    def causal(
        self, key: LinearSlotWeights, value: Tensor, *, chunk: int, extra: Tensor | None = None, dropout: float = 0.0
    ) -> AttentionState:
        """Queries (`self`) read all keys up to themselves, those of their chunk one by one."""
        if extra is not None or dropout:
            return self.biased(
                causal_slots_dense(self.unbiased(), key, value, chunk=chunk, extra=extra, dropout=dropout)
            )
        return self.biased(causal_slot_attention(self.slot_inputs(key, value), chunk))


def inter_block_dense(
    query: SlotWeights, key: SlotWeights, value: Tensor, reach: BlockReach, *, extra: Tensor | None, dropout: float
) -> AttentionState:
    """`SlotWeights.inter_block` with the states of all units, and log-weights of all queries if there is dropout."""
    number, units = torch.arange(query.dense().shape[2], device=value.device), reach.units
    before = number * units - reach.margin
    after = None if reach.is_causal else (number + 1) * units + reach.margin
    states = key.summarise(value)
    return query.read(states_around(states, before, after), extra=extra, dropout=dropout)


def causal_slots_dense(
    query: SlotWeights, key: SlotWeights, value: Tensor, *, chunk: int, extra: Tensor | None, dropout: float
) -> AttentionState:
    """`SlotWeights.causal` from all log-weights: halves of a pair at a time within a chunk, states between chunks."""
    blocks = Blocks(value.shape[2], chunk)
    if blocks.num_blocks * chunk > value.shape[2]:
        real = blocks.split(torch.ones_like(value[:1, :1, :, :1])) > 0
        query, key = query.map_tokens(blocks.split), key.map_tokens(blocks.split).masked(real)
    else:
        query, key = query.map_tokens(blocks.split), key.map_tokens(blocks.split)
    value, extra = blocks.split(value), None if extra is None else blocks.split(extra)
    query_logits, key_logits = query.dense(), key.dense()
    query_logits = query_logits if extra is None else query_logits + extra
    partials, half = [own_key(query_logits, key_logits, value, dropout=dropout)], 1
    while half < chunk:
        partials.append(between_halves(query_logits, key_logits, value, half, is_causal=True, dropout=dropout))
        half *= 2
    if blocks.num_blocks > 1:
        partials.append(inter_block_dense(query, key, value, BlockReach(is_causal=True), extra=extra, dropout=dropout))
    merged = merge_states(partials)
    return AttentionState(blocks.join(merged.output), blocks.join(merged.lse.unsqueeze(-1)).squeeze(-1))
