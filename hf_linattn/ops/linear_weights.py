"""Log-weights that are linear in the token, `a[t, j] = x_t . w_j + r_t + e_j`: those of softmax kernels.

`r_t` only shifts the log-sum-exp of a softmax over slots, and `e_j` that of one over tokens: both are a softmax of dot
products with a bias per member, `kernels.attend`, whose memory is that of its inputs and outputs, and no log-weights
are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.attend import attend
from ..kernels.attention_state import AttentionState
from ..kernels.block_slots import BlockReach, block_slot_attention
from ..kernels.causal_slots import causal_slot_attention
from ..kernels.half_norm import length_bias
from ..kernels.slot_inputs import SlotInputs
from .noise import Dropped
from .slot_weights import SlotWeights


class TokenRule(NamedTuple):
    """What a token adds to its log-weights for all slots, as a function of itself.

    `-norm |token|^2 / 2 + shift`, and with `spreads` minus the log-sum-exp of `token . slot_j + slot_bias_j`: then its
    weights add up to one.

    root: What tokens still have to be multiplied by (`LinearSlotWeights.tokens`).
    """

    norm: float = 0.0
    shift: float = 0.0
    spreads: bool = False
    root: float = 1.0


@dataclass(frozen=True)
class LinearSlotWeights(SlotWeights):
    """`a[t, j] = token_t . slot_j + token_bias_t + slot_bias_j`.

    What is not asked for is not computed: the kernel of short inputs scales tokens and finds their biases by itself.

    tokens: `[batch, heads, ..., tokens, dim]`, but for the factor `rule.root`.
    given_bias: `[batch, heads, ..., tokens, 1]`, beside that of `rule` the bias of a token; `None` for 0.
    slots: `[heads, slots, dim]` or `[batch, heads, slots, dim]`, with dimensions of 1 where tokens have more of them.
    given_slot_bias: The same without `dim`; `None` for 0.
    pair_bias: `[batch, heads, ..., tokens, slots]`, what is not linear in the token; `None` for nothing.
    """

    tokens: Tensor
    given_bias: Tensor | None
    slots: Tensor
    given_slot_bias: Tensor | None
    pair_bias: Tensor | None = None
    rule: TokenRule = TokenRule()

    @property
    def num_slots(self) -> int:
        return self.slots.shape[-2]

    def for_tokens_as_they_are(self) -> LinearSlotWeights:
        """With the factor of the tokens in the few slots."""
        root = self.rule.root
        if root == 1:
            return self
        return replace(self, slots=self.slots * root, rule=self.rule._replace(norm=self.rule.norm * root**2, root=1.0))

    @property
    def token_bias(self) -> Tensor:
        """`[batch, heads, ..., tokens, 1]`, in float32 or wider."""
        norm, shift, spreads, root = self.rule
        if root != 1:
            return self.for_tokens_as_they_are().token_bias
        if norm:
            bias = length_bias(self.tokens, factor=norm, less=-shift)
            return bias if self.given_bias is None else bias + self.given_bias
        if spreads:
            bias = self._products().logsumexp(-1, keepdim=True)
            return -bias if self.given_bias is None else self.given_bias - bias
        if self.given_bias is not None:
            return self.given_bias + shift if shift else self.given_bias
        wide = torch.promote_types(self.tokens.dtype, torch.float32)
        return torch.full_like(self.tokens[..., :1], shift, dtype=wide)

    @property
    def slot_bias(self) -> Tensor:
        """`[.., slots]`, in float32 or wider."""
        if self.given_slot_bias is not None:
            return self.given_slot_bias
        wide = torch.promote_types(self.slots.dtype, torch.float32)
        return torch.zeros_like(self.slots[..., 0], dtype=wide)

    def _products(self) -> Tensor:
        """`token . slot + slot_bias`, in float32 or wider."""
        wide = torch.promote_types(self.tokens.dtype, torch.float32)
        slots = self.for_tokens_as_they_are().slots.to(wide)
        products = self.tokens.to(wide) @ slots.transpose(-1, -2)
        return products if self.given_slot_bias is None else products + self.given_slot_bias.unsqueeze(-2)

    def plus(self, bias: Tensor) -> LinearSlotWeights:
        """With a bias more, `[batch or 1, heads, tokens or 1, 1]`, of the tokens."""
        if self.given_bias is not None:
            bias = self.given_bias + bias
        return replace(self, given_bias=bias)

    def _with_bias(self, bias: Tensor | None) -> LinearSlotWeights:
        """The same with this bias of tokens in place of all that it was."""
        return replace(self, given_bias=bias, slots=self.for_tokens_as_they_are().slots, rule=TokenRule())

    def dense(self) -> Tensor:
        linear = self._products() + self.token_bias
        return linear if self.pair_bias is None else linear + self.pair_bias

    def map_tokens(self, fn: Callable[[Tensor], Tensor]) -> LinearSlotWeights:
        """Rearrange the tokens: `fn` gets `[batch, heads, tokens, dim]`, also for the bias (`dim` 1)."""
        tokens, slots, slot_bias = fn(self.tokens), self.for_tokens_as_they_are().slots, self.given_slot_bias
        for _ in range(tokens.ndim - self.tokens.ndim):
            slots, slot_bias = slots.unsqueeze(-3), None if slot_bias is None else slot_bias.unsqueeze(-2)
        pair_bias = None if self.pair_bias is None else fn(self.pair_bias)
        return LinearSlotWeights(tokens, fn(self.token_bias), slots, slot_bias, pair_bias)

    def masked(self, visible: Tensor | None) -> LinearSlotWeights:
        return self if visible is None else self._with_bias(self.token_bias.masked_fill(~visible, float("-inf")))

    def shuffled(self) -> LinearSlotWeights:
        pair_bias = None if self.pair_bias is None else self.pair_bias.roll(1, dims=-1)
        slots, slot_bias = self.slots.roll(1, dims=-2), self.slot_bias.roll(1, dims=-1)
        return replace(self, slots=slots, given_slot_bias=slot_bias, pair_bias=pair_bias)

    def without_mass(self) -> LinearSlotWeights:
        return self._with_bias(torch.full_like(self.token_bias, float("-inf")))

    def without_token_bias(self) -> LinearSlotWeights:
        return self._with_bias(None)

    def add_token_bias(self, state: AttentionState) -> AttentionState:
        return AttentionState(state.output, state.lse + self.token_bias.squeeze(-1))

    def without_common_factor(self, agreed: Callable[[Tensor], Tensor] = lambda z: z) -> LinearSlotWeights:
        """Without the largest factor of a token."""
        bias = self.token_bias
        largest = agreed(bias.detach().amax(-2, keepdim=True))
        return self._with_bias(bias - largest.clamp_min(torch.finfo(largest.dtype).min))

    def summarise(self, values: Tensor) -> AttentionState:
        slots = self.for_tokens_as_they_are().slots
        state = attend(slots, self.tokens, values, bias=self.token_bias.squeeze(-1))
        return AttentionState(state.output, state.lse + self.slot_bias)

    def read(self, slots: AttentionState, *, dropped: Dropped | None = None) -> AttentionState:
        if self.pair_bias is not None or dropped is not None:
            return super().read(slots, dropped=dropped)
        own = self.for_tokens_as_they_are()
        return attend(own.tokens, own.slots, slots.output, bias=slots.lse + own.slot_bias)

    def slot_inputs(self, key: LinearSlotWeights, value: Tensor) -> SlotInputs:
        """Queries (`self`), keys and values, for the kernels of attention through slots."""
        own, key = self.for_tokens_as_they_are(), key.for_tokens_as_they_are()
        maps = (own.slots, own.slot_bias, key.slots, key.slot_bias)
        if self.tokens.ndim > 4:  # blocks of tokens, which share their slots
            maps = (maps[0].squeeze(-3), maps[1].squeeze(-2), maps[2].squeeze(-3), maps[3].squeeze(-2))
        return SlotInputs(self.tokens, *maps[:2], key.tokens, key.token_bias.squeeze(-1), *maps[2:], value)

    def inter_block(
        self, key: SlotWeights, value: Tensor, reach: BlockReach, dropped: Dropped | None
    ) -> AttentionState:
        assert isinstance(key, LinearSlotWeights)
        if self.pair_bias is not None or dropped is not None:
            return super().inter_block(key, value, reach, dropped)
        return block_slot_attention(self.slot_inputs(key, value), reach)

    def causal(self, key: SlotWeights, value: Tensor, chunk: int, dropped: Dropped | None) -> AttentionState:
        assert isinstance(key, LinearSlotWeights)
        if self.pair_bias is not None or dropped is not None:
            return super().causal(key, value, chunk, dropped)
        return causal_slot_attention(self.slot_inputs(key, value), chunk)
