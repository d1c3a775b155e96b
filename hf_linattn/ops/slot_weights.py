"""Log-weights of tokens for slots, and the two softmaxes of `softmax.py` over them, whatever they are a function of.

Those of softmax kernels are linear in the token (`linear_weights.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.attention_state import AttentionState, merge_states
from ..kernels.block_slots import BlockReach
from .dense_slots import between_halves, own_token, states_around
from .layout import Blocks
from .noise import Dropped, SlotDropout, dropped_slots, with_noise
from .softmax import mask_logits, softmax_with_lse


class SlotWeights(ABC):
    """Log-weights of queries or keys for slots, whatever they are a function of.

    The methods here evaluate them from the log-weights themselves; `LinearSlotWeights` does without these. What
    queries read leaves out the factor that belongs to a query alone, which does not change the output.
    `add_token_bias` puts it on, last: added to every logit, minus half the squared length of a query is all that
    rounding leaves of it.
    """

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """How many slots there are."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All log-weights, `[batch, heads, ..., tokens, slots]`."""

    @abstractmethod
    def map_tokens(self, fn: Callable[[Tensor], Tensor]) -> SlotWeights:
        """Rearrange the tokens: `fn` gets `[batch, heads, tokens, dim]`."""

    @abstractmethod
    def masked(self, visible: Tensor | None) -> SlotWeights:
        """Weight 0 for tokens where `visible` (`[batch, 1 or heads, ..., tokens, 1]`) is False."""

    def without_token_bias(self) -> SlotWeights:
        """Without the factors that belong to a token alone."""
        return self

    def without_common_factor(self, agreed: Callable[[Tensor], Tensor] = lambda z: z) -> SlotWeights:
        """Without a factor that all slots have in common: for keys beside no exact ones.

        `agreed` makes of the largest of these tokens that of others too, which are to have the same factor.
        """
        return self

    def add_token_bias(self, state: AttentionState) -> AttentionState:
        """What these queries have read, with the factors that belong to them alone in its log-sum-exp."""
        return state

    @abstractmethod
    def shuffled(self) -> SlotWeights:
        """The weight for slot j as that for slot j + 1, for the last as that for the first."""

    @abstractmethod
    def without_mass(self) -> SlotWeights:
        """Weight 0 for all tokens: as queries, they read nothing through slots."""

    def summarise(self, values: Tensor) -> AttentionState:
        """Every slot reads all tokens: output `[batch, heads, ..., slots, head_dim]`, lse `[..., slots]`."""
        return softmax_with_lse(self.dense().transpose(-1, -2), values)

    def read(self, slots: AttentionState, *, dropped: Dropped | None = None) -> AttentionState:
        """Every token reads all slots."""
        logits = self.without_token_bias().dense() + slots.lse.unsqueeze(-2)
        return softmax_with_lse(logits, slots.output, dropped=dropped)

    def inter_block(
        self, key: SlotWeights, value: Tensor, reach: BlockReach, dropped: Dropped | None
    ) -> AttentionState:
        """Blocks of queries (`self`) read the units of keys that they reach, through slots.

        Tokens are `[batch, heads, blocks, tokens of a block, ...]`, values `[batch, heads, units, keys, head_dim]`.
        """
        units = reach.units
        block = torch.arange(-(-value.shape[2] // units), device=value.device)
        before = block * units - reach.margin
        after = None if reach.is_causal else (block + 1) * units + reach.margin
        states = states_around(key.summarise(value), before, after)
        return self.read(states, dropped=dropped)

    def causal(self, key: SlotWeights, value: Tensor, chunk: int, dropped: Dropped | None) -> AttentionState:
        """Queries (`self`) read all keys up to themselves: those of their chunk (a power of 2) one by one, halves of
        a pair at a time (intra-chunk), those of earlier chunks through states of the slots (inter-chunk)."""
        blocks = Blocks(value.shape[2], chunk)
        query, key = self.without_token_bias().map_tokens(blocks.split), key.map_tokens(blocks.split)
        if not blocks.is_whole:
            key = key.masked(blocks.split(torch.ones_like(value[:1, :1, :, :1])) > 0)
        if dropped is not None:
            dropped = dropped._replace(mask=blocks.split(dropped.mask))
        value = blocks.split(value)
        query_logits, key_logits = query.dense(), key.dense()
        states, half = [own_token(query_logits, key_logits, value, dropped=dropped)], 1
        while half < chunk:
            states.append(between_halves(query_logits, key_logits, value, half, is_causal=True, dropped=dropped))
            half *= 2
        if blocks.num_blocks > 1:
            states.append(query.inter_block(key, value, BlockReach(is_causal=True), dropped))
        merged = merge_states(states)
        return AttentionState(blocks.join(merged.output), blocks.join(merged.lse.unsqueeze(-1)).squeeze(-1))


def dropped_from(
    query_weights: SlotWeights,
    dropout: float | SlotDropout,
    query: Tensor,
    position: Tensor | None = None,
    slot_numbers: Tensor | None = None,
) -> Dropped | None:
    """The slots that queries `[batch, heads, tokens, dim]` do without; `None` for none.

    Args:
        position: Of every query in its row, `[batch, tokens]`; `None` for 0, 1, 2, ...
        slot_numbers: `[slots]`, what a slot is known by whatever the number of slots; `None` for 0, 1, 2, ...
    """
    if position is None:
        position = torch.arange(query.shape[2], device=query.device)[None]
    if slot_numbers is None:
        slot_numbers = torch.arange(query_weights.num_slots, device=query.device)
    return dropped_slots(with_noise(dropout, query), query, position[:, None, :, None], slot_numbers[None, None, None])


class FeatureMap(Protocol):
    """What it takes to weigh any queries and keys, scaled, `[batch, heads, tokens, dim]`, for the slots of a layer."""

    def query_weights(self, query: Tensor) -> SlotWeights:
        """Log-weights of queries."""

    def key_weights(self, key: Tensor) -> SlotWeights:
        """Log-weights of keys."""


@dataclass(frozen=True)
class DenseSlotWeights(SlotWeights):
    """Log-weights that are no dot products. log_weights: `[batch, heads, ..., tokens, slots]`."""

    log_weights: Tensor

    @property
    def num_slots(self) -> int:
        return self.log_weights.shape[-1]

    def dense(self) -> Tensor:
        return self.log_weights

    def map_tokens(self, fn: Callable[[Tensor], Tensor]) -> DenseSlotWeights:
        return DenseSlotWeights(fn(self.log_weights))

    def masked(self, visible: Tensor | None) -> DenseSlotWeights:
        return DenseSlotWeights(mask_logits(self.log_weights, visible))

    def shuffled(self) -> DenseSlotWeights:
        return DenseSlotWeights(self.log_weights.roll(1, dims=-1))

    def without_mass(self) -> DenseSlotWeights:
        return DenseSlotWeights(torch.full_like(self.log_weights, float("-inf")))
