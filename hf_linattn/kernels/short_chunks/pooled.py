"""Learned chunks: keys and values pooled with weights that are trained, residual maps and a mass.

`ops/eva/learned.py` says what they are. Tokens are as in `summaries.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cutting import Sort
from .summaries import Kept

# In place of a sum that a product is not added to.
_NONE = torch.empty((), device="cpu")


def _by_head(x: Tensor) -> Tensor:
    """`[batch, tokens, heads, dim]` -> `[heads, batch * tokens, dim]`."""
    return x.flatten(0, 1).transpose(0, 1)


class Pooled:
    """Pooled chunks.

    Args:
        parameters: Tensors of a `LearnedSummariser`, in their order.
        kept: In the backward pass: keys and pooled values, `[batch, chunks, heads, dim]`, pooled keys alike.
    """

    def __init__(
        self,
        tokens: Sequence[Tensor],
        sort: Sort,
        parameters: Sequence[Tensor],
        kept: Kept | None = None,
        *,
        scaling: float,
    ) -> None:
        _, key, value = tokens
        self.tokens, self.sort, self.parameters, self.root = (key, value), sort, parameters, scaling**0.5
        batch, places, heads, dim = key.shape
        self.chunks = places // sort.length
        self.shape = (batch * self.chunks, heads, dim)
        self.is_single = sort.length == 1
        _, _, key_adapter, query_adapter, far_offset, far_slope, key_slope = parameters
        if kept is not None:
            read, self.pooled_value, self.pooled = (z.reshape(self.shape) for z in kept)
            self.read = read.transpose(0, 1)
        elif self.is_single:
            self.pooled, self.pooled_value = key.view(self.shape), value.view(self.shape)
        else:
            weights = self._weights()
            self.pooled, self.pooled_value = (self._pool(weights[..., i], z) for i, z in enumerate((key, value)))
        pooled = self.pooled.transpose(0, 1)
        self.mapped = torch.baddbmm(pooled, pooled, key_adapter)  # [heads, batch * chunks, dim]
        if kept is None:
            read = torch.baddbmm(self.mapped, self.mapped, query_adapter.mT)
            self.read = read.add_(far_slope.unsqueeze(1), alpha=1 / self.root)
        bias = torch.baddbmm(far_offset.view(-1, 1, 1), self.mapped, key_slope.unsqueeze(-1), alpha=self.root)
        self.bias = bias.view(heads, batch, self.chunks).transpose(0, 1)

    def _weights(self) -> Tensor:
        """Of the members in their chunk's key, and in its value: `[heads, batch * chunks, members, 2]`."""
        key_pooling, value_pooling, *_ = self.parameters
        pooling = torch.stack([key_pooling, value_pooling], -1)
        logits = torch.baddbmm(_NONE.to(pooling), _by_head(self.tokens[0]), pooling, beta=0, alpha=self.root)
        logits = logits.view(len(logits), -1, self.sort.length, 2)
        if self.sort.absent is not None:
            logits.masked_fill_(self.sort.absent, torch.finfo(logits.dtype).min)
        return logits.softmax(2)

    def _pool(self, weights: Tensor, tokens: Tensor) -> Tensor:
        number, heads, dim = self.shape
        weighted = self._members(tokens) * weights.permute(1, 2, 0).unsqueeze(-1)  # in the layout of the first
        return torch.bmm(self.sort.ones, weighted.reshape(number, -1, heads * dim)).view(self.shape)

    def _members(self, tokens: Tensor) -> Tensor:
        """`[batch * chunks, members, heads, dim]`."""
        return tokens.view(-1, self.sort.length, *self.shape[1:])

    @property
    def key(self) -> Tensor:
        return self.read.view(len(self.read), -1, self.chunks, self.shape[-1]).transpose(0, 1)

    @property
    def value(self) -> Tensor:
        return self.pooled_value.view(-1, self.chunks, *self.shape[1:]).transpose(1, 2)

    @property
    def kept(self) -> Kept:
        shape = (-1, self.chunks, *self.shape[1:])
        return (
            self.read.transpose(0, 1).contiguous().view(shape),
            self.pooled_value.view(shape),
            self.pooled.view(shape),
        )

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        assert of_bias is not None
        _, to_key, to_value = (self._members(z) for z in grads)
        key_pooling, value_pooling, key_adapter, query_adapter, _, _, key_slope = self.parameters
        of_read, of_mass = of_key.transpose(0, 1).flatten(1, 2), of_bias.transpose(0, 1).reshape(len(key_slope), -1, 1)
        of_mapped = torch.baddbmm(of_read, of_read, query_adapter)
        of_mapped.addcmul_(of_mass, key_slope.unsqueeze(1), value=self.root)
        of_maps = (
            torch.bmm(self.pooled.permute(1, 2, 0), of_mapped),
            torch.bmm(of_read.mT, self.mapped),
            of_mass.sum((1, 2)),
            of_read.sum(1).div_(self.root),
            torch.bmm(self.mapped.mT, of_mass).squeeze(-1).mul_(self.root),
        )
        of_pooled = torch.baddbmm(of_mapped, of_mapped, key_adapter.mT)
        of_pooled = of_pooled.transpose(0, 1).unsqueeze(1)
        of_value = of_value.transpose(1, 2).reshape(self.shape).unsqueeze(1)
        if self.is_single:
            to_key.add_(of_pooled)
            to_value.add_(of_value)
            none = torch.zeros_like(key_slope)
            return none, none, *of_maps
        key, value = (self._members(z) for z in self.tokens)
        weights = self._weights()
        of_weights = torch.stack([(key * of_pooled).sum(-1), (value * of_value).sum(-1)], -1).movedim(2, 0)
        of_logits = torch._softmax_backward_data(of_weights, weights, 2, weights.dtype).mul_(self.root)
        weights = weights.movedim(0, 2).unsqueeze(-1)
        to_key.addcmul_(weights[..., 0, :], of_pooled)
        to_value.addcmul_(weights[..., 1, :], of_value)
        of_logits = of_logits.flatten(1, 2)
        pooling = torch.stack([key_pooling, value_pooling], 1)
        to_key.view(-1, *self.shape[1:]).transpose(0, 1).add_(torch.bmm(of_logits, pooling))
        of_pooling = torch.bmm(of_logits.mT, _by_head(self.tokens[0]))
        return *(z.clone() for z in of_pooling.unbind(1)), *of_maps
