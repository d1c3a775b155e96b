"""The softmaxes of `slots.py` when their logits are dot products: no logits are kept for the backward pass.

Log-weights of tokens and slots are linear in the token, `a[t, j] = x_t . w_j + r_t + e_j`. Then `r_t` only shifts the
mass of a softmax over slots, and `e_j` that of one over tokens: both are a softmax of dot products with a bias per
member, `attend`. Its backward pass recomputes the weights from the log-sum-exp: memory is that of inputs and outputs,
and the log-sum-exp itself is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .slots import Partial, weigh

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

    def summarise(self, values: Tensor) -> Partial:
        """Every slot reads all tokens: output `[batch, heads, ..., slots, head_dim]`, log_mass `[..., slots]`."""

    def read(self, slots: Partial, *, extra: Tensor | None = None, dropout: float = 0.0) -> Partial:
        """Every token reads all slots. `extra` is added to the log-weights, `[batch, heads, ..., tokens, slots]`."""


@dataclass(frozen=True)
class LogWeights:
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
        return self.tokens @ self.slots.transpose(-1, -2) + self.token_bias + self.slot_bias.unsqueeze(-2)

    def map_tokens(self, fn: Callable[[Tensor], Tensor]) -> LogWeights:
        """Rearrange the tokens: `fn` gets `[batch, heads, tokens, dim]`, also for the bias (`dim` 1)."""
        tokens, bias = fn(self.tokens), fn(self.token_bias)
        extra = tokens.ndim - self.tokens.ndim
        slots, slot_bias = self.slots, self.slot_bias
        for _ in range(extra):
            slots, slot_bias = slots.unsqueeze(-3), slot_bias.unsqueeze(-2)
        return LogWeights(tokens, bias, slots, slot_bias)

    def masked(self, visible: Tensor | None) -> LogWeights:
        """Weight 0 for tokens where `visible` (`[batch, 1, ..., tokens, 1]`) is False."""
        if visible is None:
            return self
        bias = self.token_bias.masked_fill(~visible, float("-inf"))
        return LogWeights(self.tokens, bias, self.slots, self.slot_bias)

    def summarise(self, values: Tensor) -> Partial:
        """Every slot reads all tokens: output `[batch, heads, ..., slots, head_dim]`, log_mass `[..., slots]`."""
        state = attend(self.slots, self.tokens, values, bias=self.token_bias.squeeze(-1))
        return Partial(state.output, state.log_mass + self.slot_bias)

    def read(self, slots: Partial, *, extra: Tensor | None = None, dropout: float = 0.0) -> Partial:
        """Every token reads all slots. `extra` is added to the log-weights, `[batch, heads, ..., tokens, slots]`."""
        if extra is not None or dropout:
            logits = self.dense() + slots.log_mass.unsqueeze(-2)
            return weigh(logits if extra is None else logits + extra, slots.output, dropout=dropout)
        out = attend(self.tokens, self.slots, slots.output, bias=slots.log_mass + self.slot_bias)
        return Partial(out.output, out.log_mass + self.token_bias.squeeze(-1))


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, visible: Tensor | None = None
) -> Partial:
    """Softmax of `query . key + bias` over the keys, applied to `value`, with its log-sum-exp.

    Args:
        query: `[..., queries, dim]`. key: `[..., keys, dim]`. value: `[..., keys, head_dim]`; leading dimensions
            broadcast.
        bias: `[..., keys]`, `-inf` for a key that no query sees.
        visible: Broadcasts to `[..., queries, keys]`; False hides a key from a query.
    """
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    if bias is not None:
        lead = torch.broadcast_shapes(lead, bias.shape[:-1])
        bias = bias.expand(*lead, -1)
    query, key, value = (z.expand(*lead, -1, -1) for z in (query, key, value))
    return Partial(*_Attend.apply(query, key, value, bias, visible))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weights = _logits(query, key, bias, visible)
        top = weights.amax(-1, keepdim=True).clamp_min_(torch.finfo(weights.dtype).min)
        weights.sub_(top).exp_()
        total = weights.sum(-1)
        empty = total == 0
        total.masked_fill_(empty, 1.0)
        output = weights @ value
        output /= total.unsqueeze(-1)
        log_mass = total.log_().add_(top.squeeze(-1)).masked_fill_(empty, float("-inf"))
        ctx.save_for_backward(query, key, value, bias, visible, output, log_mass)
        return output, log_mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, bias, visible, output, log_mass = ctx.saved_tensors
        grad_output, grad_mass = grads
        # Where nothing is visible all logits are -inf, and so weights and gradients are 0 whatever is taken off.
        weights = _logits(query, key, bias, visible)
        weights.sub_(log_mass.masked_fill(log_mass == float("-inf"), 0.0).unsqueeze(-1)).exp_()
        grad_value = weights.transpose(-1, -2) @ grad_output if ctx.needs_input_grad[2] else None
        grad_logits = grad_output @ value.transpose(-1, -2)
        grad_logits.sub_(((grad_output * output).sum(-1) - grad_mass).unsqueeze(-1)).mul_(weights)
        grad_query = grad_logits @ key if ctx.needs_input_grad[0] else None
        grad_key = grad_logits.transpose(-1, -2) @ query if ctx.needs_input_grad[1] else None
        grad_bias = grad_logits.sum(-2) if ctx.needs_input_grad[3] else None
        return grad_query, grad_key, grad_value, grad_bias, None


def _logits(query: Tensor, key: Tensor, bias: Tensor | None, visible: Tensor | None) -> Tensor:
    logits = query @ key.transpose(-1, -2)
    if bias is not None:
        logits += bias.unsqueeze(-2)
    if visible is not None:
        logits.masked_fill_(~visible, float("-inf"))
    return logits
