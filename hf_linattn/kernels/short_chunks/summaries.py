"""Chunks made of their tokens: what stands for each, and the way back from its gradients.

Tokens are `[batch, chunks, members, heads, dim]` and not scaled, nor are the keys of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .cutting import Sort

# What is kept for the backward pass, `[batch, ..., heads(, dim)]`: `key` and `value` of the summaries, and one more.
Kept = tuple[Tensor, Tensor, Tensor]


class Summaries(Protocol):
    """key, value: `[batch, chunks, heads, dim]`. bias: `[batch, heads, chunks]`, added to the logits, or `None`."""

    @property
    def key(self) -> Tensor: ...

    @property
    def value(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def kept(self) -> Kept:
        """All contiguous."""

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """From the gradients of the summaries to those of the parameters, which it returns, and of queries, keys and
        values, `[batch, places, heads, dim]`, which it adds to `grads`."""


def _members(tokens: Sequence[Tensor], length: int) -> list[Tensor]:
    """`[batch, chunks, members, heads, dim]`, views."""
    batch, _, heads, dim = tokens[0].shape
    return [z.view(batch, -1, length, heads, dim) for z in tokens]


def _by_head(x: Tensor) -> Tensor:
    """`[batch, ..., heads, dim]` -> `[heads, batch * ..., dim]`."""
    return x.flatten(0, -3).transpose(0, 1)


def _like_tokens(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_by_head`."""
    return x.transpose(0, 1).reshape(like.shape)


class ControlVariates:
    """Mean keys, and values at a proposal.

    Args:
        sort: What kind of chunks these are.
        query_adapter, key_adapter: `[heads, dim, dim]`, residual maps of the means, or `None`.
        kept: In the backward pass; the last are the weights of the members, `[batch, tokens, heads]`.
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
        query, key, value = _members(tokens, sort.length)
        self.query_adapter, self.key_adapter = parameters
        self.value_members, self.sort, self.proposals, self.scaling = value, sort, proposals, scaling
        self.is_single = key.shape[2] == 1
        if kept is not None:
            self.key, self.value, weight = kept
            self.weight = weight.view(key.shape[:-1]) if weight.numel() else weight
        residual = None
        if self.is_single:
            self.centre = centre = key.squeeze(2)
        elif kept is not None and self.key_adapter is None:
            self.centre = centre = self.key
        else:
            self.centre = centre = key.sum(2).mul_(sort.share)
        if self.key_adapter is not None:
            residual = _like_tokens(_by_head(centre) @ self.key_adapter, centre)
        if kept is None:
            self.key = centre if residual is None else centre + residual
        if self.is_single:
            if kept is None:
                self.value, self.weight = value.squeeze(2), key.new_empty(len(key), 0, key.shape[3])
            return
        self.query_mean = None
        proposal = residual  # relative to the centre
        if proposals in ("sum", "mean"):
            self.query_mean = mean = query.sum(2).mul_(sort.share)
            if self.query_adapter is not None:
                mean = mean + _like_tokens(_by_head(mean) @ self.query_adapter, mean)
            proposal = mean if proposal is None else proposal + mean
            if proposals == "mean":
                proposal = (proposal - centre) / 2
        elif proposals == "none":
            proposal = -centre
        # `mu . y - |y|^2 / 2` relative to the chunk's centre, which all members have in common, as one product.
        self.centred = key - centre.unsqueeze(2)
        self.apart = -self.centred if proposal is None else proposal.unsqueeze(2) - self.centred
        if kept is not None:
            return
        logits = torch.add(self.apart, self.centred, alpha=0.5).mul_(self.centred).sum(-1).mul_(scaling)
        if sort.member is not None:  # a chunk without any has the mean of zeros
            logits.masked_fill_(~sort.member.unsqueeze(-1), torch.finfo(logits.dtype).min)
        self.weight = logits.softmax(2)
        self.value = (self.weight.unsqueeze(-1) * value).sum(2)

    @property
    def kept(self) -> Kept:
        return self.key.contiguous(), self.value.contiguous(), self.weight.flatten(1, -2)

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        to_query, to_key, to_value = _members(grads, self.sort.length)
        of_mean, of_value = of_key, of_value.unsqueeze(2)
        of_query_adapter = of_key_adapter = None
        if self.is_single:
            to_value.add_(of_value)
        else:
            weight = self.weight
            of_weight = (self.value_members * of_value).sum(-1)
            of_logits = torch._softmax_backward_data(of_weight, weight, 2, weight.dtype)
            of_logits = of_logits.mul_(self.scaling).unsqueeze(-1)
            to_value.addcmul_(weight.unsqueeze(-1), of_value)
            to_key.addcmul_(of_logits, self.apart)
            if self.proposals != "none":
                of_proposal = (of_logits * self.centred).sum(2)
                if self.proposals == "mean":
                    of_proposal.div_(2)
                of_mean = of_mean + of_proposal
            if self.query_mean is not None:
                of_query = of_proposal
                if self.query_adapter is not None:
                    upstream = _by_head(of_query)
                    of_query_adapter = _by_head(self.query_mean).mT @ upstream
                    of_query = of_query + _like_tokens(upstream @ self.query_adapter.mT, of_query)
                to_query.add_((of_query * self.sort.share).unsqueeze(2))
        if self.key_adapter is not None:
            upstream = _by_head(of_mean)
            of_key_adapter = _by_head(self.centre).mT @ upstream
            of_mean = of_mean + _like_tokens(upstream @ self.key_adapter.mT, of_mean)
        to_key.add_((of_mean * self.sort.share).unsqueeze(2))
        return of_query_adapter, of_key_adapter


class Pooled:
    """Keys and values pooled with learned weights, residual maps and a mass (`ops/eva/learned.py`).

    Args:
        parameters: Tensors of a `LearnedSummariser`, in their order.
        kept: In the backward pass; the last are the pooled keys.
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
        _, key, value = self.members = _members(tokens, sort.length)
        key_pooling, value_pooling, key_adapter, query_adapter, far_offset, far_slope, key_slope = parameters
        self.sort, self.parameters, self.root = sort, parameters, scaling**0.5
        self.is_single = key.shape[2] == 1
        if kept is not None:
            self.key, self.value, pooled = kept
        elif self.is_single:
            pooled, self.value = key.squeeze(2), value.squeeze(2)
        else:
            pooled, self.value = self._pooled(key_pooling, key), self._pooled(value_pooling, value)
        self.pooled = pooled
        self.mapped = torch.baddbmm(_by_head(pooled), _by_head(pooled), key_adapter)
        if kept is None:
            read = torch.baddbmm(self.mapped, self.mapped, query_adapter.mT)
            read.add_(far_slope.unsqueeze(1), alpha=1 / self.root)
            self.key = read.unflatten(1, key.shape[:2]).permute(1, 2, 0, 3)
        bias = torch.baddbmm(far_offset.view(-1, 1, 1), self.mapped, key_slope.unsqueeze(-1), alpha=self.root)
        self.bias = bias.view(-1, *key.shape[:2]).transpose(0, 1)

    @property
    def kept(self) -> Kept:
        return self.key.contiguous(), self.value.contiguous(), self.pooled.contiguous()

    def _pooled(self, weights: Tensor, tokens: Tensor) -> Tensor:
        """A softmax over the members of a chunk, `[batch, chunks, heads, dim]`."""
        key, mask = self.members[1].flatten(0, 1).transpose(1, 2), self.sort.member
        if mask is not None:
            mask = key.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(key.dtype).min)
            mask = mask[:, None, None].repeat(len(key) // len(mask), 1, 1, 1).expand(*key.shape[:2], 1, -1)
        pooled, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            weights.unsqueeze(1).expand(len(key), -1, 1, -1),
            key,
            tokens.flatten(0, 1).transpose(1, 2),
            attn_mask=mask,
            scale=self.root,
        )
        return pooled.transpose(1, 2).reshape(*tokens.shape[:2], *tokens.shape[3:])

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        assert of_bias is not None
        _, to_key, to_value = _members(grads, self.sort.length)
        key_pooling, value_pooling, key_adapter, query_adapter, _, _, key_slope = self.parameters
        _, key, value = self.members
        of_read, of_mass = _by_head(of_key), of_bias.transpose(0, 1).flatten(1).unsqueeze(-1)
        of_mapped = torch.baddbmm(of_read, of_read, query_adapter)
        of_mapped.addcmul_(of_mass, key_slope.unsqueeze(1), value=self.root)
        of_maps = (
            _by_head(self.pooled).mT @ of_mapped,
            of_read.mT @ self.mapped,
            of_mass.sum((1, 2)),
            of_read.sum(1) / self.root,
            torch.bmm(self.mapped.mT, of_mass).squeeze(-1) * self.root,
        )
        shape = (*key.shape[:2], 1, *key.shape[3:])
        of_pooled = torch.baddbmm(of_mapped, of_mapped, key_adapter.mT).transpose(0, 1).reshape(shape)
        of_value = of_value.unsqueeze(2)
        if self.is_single:
            to_key.add_(of_pooled)
            to_value.add_(of_value)
            none = torch.zeros_like(key_slope)
            return none, none, *of_maps
        pooling = torch.stack([key_pooling, value_pooling], -1)
        keys = _by_head(key)
        logits = torch.bmm(keys, pooling).mul_(self.root).unflatten(1, key.shape[:3])
        if self.sort.member is not None:
            logits.masked_fill_(~self.sort.member[..., None], torch.finfo(logits.dtype).min)
        weights = logits.softmax(3)
        of_weights = torch.stack([(key * of_pooled).sum(-1), (value * of_value).sum(-1)], -1).movedim(3, 0)
        of_logits = torch._softmax_backward_data(of_weights, weights, 3, weights.dtype).mul_(self.root)
        weights = weights.movedim(0, 3).unsqueeze(-1)
        to_key.addcmul_(weights[..., 0, :], of_pooled)
        to_value.addcmul_(weights[..., 1, :], of_value)
        of_logits = of_logits.flatten(1, 3)
        to_key.add_(torch.bmm(of_logits, pooling.mT).unflatten(1, key.shape[:3]).movedim(0, 3))
        return *torch.bmm(keys.mT, of_logits).unbind(-1), *of_maps
