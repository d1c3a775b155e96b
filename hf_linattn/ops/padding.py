"""Tokens as estimators take them, padding last and global tokens apart, and how results get back to their places.

The rule for padding is that a row is treated as if it had been given without it. So `inputs.prepare_tokens` moves the
real tokens of each row to its front, and `Tokens.finish` moves the results back; what happens between them needs to
know only how many tokens of a row are real.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.attend import attend
from ..kernels.attention_state import AttentionState, merge_states
from .ablation import ABLATED, exact_value


def without_padding(key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masked keys and values set to 0, so that inf or NaN in the padding reaches neither values nor gradients."""
    if key_mask is None:
        return key, value
    padding = ~key_mask[:, None, :, None]
    return key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)


def real_tokens_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`[batch, tokens]`: the order that moves the real tokens of each row to its front, and which are real then."""
    order = mask.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    return order, mask.gather(1, order)


def reorder_tokens(x: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """`x` `[batch, heads, tokens, dim]` with its tokens in another order; 0 where the result is not `real`."""
    moved = x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))
    # Filled, not multiplied: whatever stood in the padding (even inf or NaN) reaches neither values nor gradients.
    return moved.masked_fill(~real[:, None, :, None], 0.0)


class GlobalTokens(NamedTuple):
    """The first `number` tokens see and are seen exactly. Tensors are those of all tokens, `valid` as in `Tokens`.

    scaling: Factor of the dot product of these tensors.
    """

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    scaling: float = 1.0

    def join(self, rest: AttentionState | None) -> Tensor:
        """Outputs of all tokens, from what the others have read of each other (`None` if there are none)."""
        query, key, value, number = self.query, self.key, self.value, self.number
        if ABLATED:
            value = exact_value(value)
        visible = None if self.valid is None else self.valid[:, None, None, :]
        first_query, first_key = query[:, :, :number], key[:, :, :number]
        if self.scaling != 1:  # of the few
            first_query, first_key = first_query * self.scaling, first_key * self.scaling
        output = attend(first_query, key, value, visible=visible).output
        if rest is None:
            return output
        if number == 1 and visible is None and query.dtype in (torch.float32, torch.float64):
            others = _with_a_key(rest, query[:, :, 1:], first_key, value[:, :, :1])
            return torch.cat([output, others], dim=2)
        visible = None if visible is None else visible[..., :number]
        seen = attend(query[:, :, number:], first_key, value[:, :, :number], visible=visible)
        return torch.cat([output, merge_states([rest, seen]).output], dim=2)


def _with_a_key(state: AttentionState, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The output with one key more, which all queries see: `[batch, heads, 1, dim]`."""
    share = torch.sigmoid(torch.linalg.vecdot(query, key) - state.lse)
    return torch.lerp(state.output, value, share.unsqueeze(-1))


@dataclass(frozen=True)
class Tokens:
    """Inputs with the padding last and without global tokens: what an estimator works on.

    query, key, value: `[batch, heads, tokens, head_dim]`, real tokens first. Queries and keys are scaled, but for
        `root`.
    valid: `[batch, tokens]`, True for a real token; `None` if all are. visible: The same as `[batch, 1, tokens, 1]`.
    grid: Height and width, if the tokens are the patches of an image.
    global_tokens: Those taken out; what is read of the others is merged with them by its log-sum-exp.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    visible: Tensor | None
    grid: tuple[int, int] | None
    _num_queries: int
    global_tokens: GlobalTokens | None
    _order: Tensor | None
    _mask: Tensor | None
    # What queries and keys still have to be multiplied by: the square root of the factor of their dot product.
    root: float = 1.0

    @property
    def lengths(self) -> Tensor:
        """Real tokens of a row, `[batch]` (`[1]` without a mask)."""
        if self.valid is None:
            return torch.full((1,), self.key.shape[2], device=self.key.device)
        return self.valid.sum(-1)

    def scaled(self) -> Tokens:
        """With scaled queries and keys."""
        if self.root == 1:
            return self
        return replace(self, query=self.query * self.root, key=self.key * self.root, root=1.0)

    def packed(self) -> Tokens:
        """On a CPU with the tokens of a head next to each other: projections leave them between those of other heads,
        and every kernel would copy them, forward and backward."""
        if self.key.device.type != "cpu":
            return self
        query, key, value = (z.contiguous() for z in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    def finish(self, estimate: AttentionState | None) -> Tensor:
        """The attention output for all queries that were asked for: global tokens and padding put back."""
        if self.global_tokens is not None:
            output = self.global_tokens.join(estimate)
        else:
            assert estimate is not None
            output = estimate.output
        if self._order is not None and self._mask is not None:
            output = reorder_tokens(output, self._order.argsort(dim=-1), self._mask)
        return output if output.shape[2] == self._num_queries else output[:, :, -self._num_queries :]
