"""Chunks made of their tokens: what stands for each, and the way back from its gradients.

Tokens are `[batch, places, heads, dim]` without gaps and not scaled, nor are the keys of chunks. Sums over the members
of a chunk are products with a row of numbers, which are faster than torch's sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .cutting import Sort

# What is kept for the backward pass. `[batch, ...]` each, contiguous.
Kept = tuple[Tensor, Tensor, Tensor]


class Summaries(Protocol):
    """key, value: `[batch, heads, chunks, dim]`. bias: `[batch, heads, chunks]`, added to the logits, or `None`."""

    @property
    def key(self) -> Tensor: ...

    @property
    def value(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def kept(self) -> Kept: ...

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """From the gradients of the summaries to those of the parameters, which it returns, and of queries, keys and
        values, `[batch, places, heads, dim]`, which it adds to `grads`."""


class ControlVariates:
    """Mean keys, and values at a proposal.

    Args:
        sort: What kind of chunks these are.
        parameters: `[heads, dim, dim]`, residual maps of mean queries and mean keys, or `None`.
        kept: In the backward pass; the last are the weights of the members, `[batch, chunks * members, heads]`.
        proposals: As in `eva_attention`.
    """

    bias: Tensor | None = None

    def __init__(
        self,
        tokens: Sequence[Tensor],
        sort: Sort,
        parameters: Sequence[Tensor | None],
        kept: Kept | None = None,
        *,
        proposals: str,
        scaling: float,
    ) -> None:
        self.batch, places, self.heads, dim = tokens[0].shape
        self.chunks = places // sort.length
        self.flat = (self.batch * self.chunks, sort.length, self.heads * dim)
        self.sort, self.proposals, self.scaling = sort, proposals, scaling
        self.query_adapter, self.key_adapter = parameters
        query, key, self.members = [z.view(self.flat) for z in tokens]
        self.is_single = sort.length == 1
        if kept is not None:
            shape = (len(key), 1, -1)
            self.mean, self.content, self.weight = kept[0].reshape(shape), kept[1].reshape(shape), kept[2]
        residual = None
        if self.is_single:
            self.centre = key
        elif kept is not None and self.key_adapter is None:
            self.centre = self.mean
        else:
            self.centre = torch.bmm(sort.share, key)
        if self.key_adapter is not None:
            residual = self._mapped(self.centre, self.key_adapter)
        if kept is None:
            self.mean = self.centre if residual is None else self.centre + residual
        if self.is_single:
            if kept is None:
                self.content, self.weight = self.members, key.new_empty(self.batch, 0, self.heads)
            return
        self.query_mean = None
        proposal = residual  # relative to the centre
        if proposals in ("sum", "mean"):
            self.query_mean = mean = torch.bmm(sort.share, query)
            if self.query_adapter is not None:
                mean = mean + self._mapped(mean, self.query_adapter)
            proposal = mean if proposal is None else proposal + mean
            if proposals == "mean":
                proposal = (proposal - self.centre) / 2
        elif proposals == "none":
            proposal = -self.centre
        self.centred, self.proposal = key - self.centre, proposal
        if kept is not None:
            return
        # `mu . y - |y|^2 / 2` relative to the chunk's centre, which all members have in common, as one product.
        by_head = (len(key), sort.length, self.heads, dim)
        logits = self._apart(0.5).mul_(self.centred).view(by_head).sum(-1).mul_(scaling)
        if sort.absent is not None:  # a chunk without any has the mean of zeros
            logits.masked_fill_(sort.absent, torch.finfo(logits.dtype).min)
        self.weight = weight = logits.softmax(1)
        weighted = weight.unsqueeze(-1) * self.members.view(by_head)
        self.content = torch.bmm(sort.ones, weighted.view(self.flat))

    def _by_head(self, x: Tensor) -> Tensor:
        """`[batch * chunks, members, heads, dim]`."""
        return x.view(len(x), -1, self.heads, x.shape[-1] // self.heads)

    def _mapped(self, mean: Tensor, adapter: Tensor) -> Tensor:
        return (self._heads_first(mean) @ adapter).transpose(0, 1).reshape(mean.shape)

    def _heads_first(self, mean: Tensor) -> Tensor:
        """`[heads, batch * chunks, dim]`."""
        return self._by_head(mean).squeeze(1).transpose(0, 1)

    def _apart(self, share: float) -> Tensor:
        """The proposal less a share of the keys."""
        if self.proposal is None:
            return self.centred * -share
        return torch.sub(self.proposal, self.centred, alpha=share)

    @property
    def key(self) -> Tensor:
        return self.mean.view(self.batch, self.chunks, self.heads, -1).transpose(1, 2)

    @property
    def value(self) -> Tensor:
        return self.content.view(self.batch, self.chunks, self.heads, -1).transpose(1, 2)

    @property
    def kept(self) -> Kept:
        shape = (self.batch, self.chunks, self.heads, -1)
        return self.mean.view(shape), self.content.view(shape), self.weight.view(self.batch, -1, self.heads)

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        to_query, to_key, to_value = (z.view(self.flat) for z in grads)
        of_mean, of_content = (z.transpose(1, 2).reshape(self.flat[0], 1, -1) for z in (of_key, of_value))
        of_query_adapter = of_key_adapter = None
        if self.is_single:
            to_value.add_(of_content)
        else:
            weight = self.weight.reshape(*self.flat[:2], self.heads)
            of_weight = self._by_head(self.members * of_content).sum(-1)
            of_logits = torch._softmax_backward_data(of_weight, weight, 1, weight.dtype)
            of_logits = of_logits.mul_(self.scaling).unsqueeze(-1)
            self._by_head(to_value).addcmul_(weight.unsqueeze(-1), self._by_head(of_content))
            self._by_head(to_key).addcmul_(of_logits, self._by_head(self._apart(1.0)))
            if self.proposals != "none":
                moved = (of_logits * self._by_head(self.centred)).view(self.flat)
                of_proposal = torch.bmm(self.sort.ones, moved)
                if self.proposals == "mean":
                    of_proposal.div_(2)
                of_mean = of_mean + of_proposal
            if self.query_mean is not None:
                of_query = of_proposal
                if self.query_adapter is not None:
                    upstream = self._heads_first(of_query)
                    of_query_adapter = self._heads_first(self.query_mean).mT @ upstream
                    of_query = of_query + self._mapped(of_query, self.query_adapter.mT)
                to_query.baddbmm_(self.sort.share.mT, of_query)
        if self.key_adapter is not None:
            of_key_adapter = self._heads_first(self.centre).mT @ self._heads_first(of_mean)
            of_mean = of_mean + self._mapped(of_mean, self.key_adapter.mT)
        to_key.baddbmm_(self.sort.share.mT, of_mean)
        return of_query_adapter, of_key_adapter
