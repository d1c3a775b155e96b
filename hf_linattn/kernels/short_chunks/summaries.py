"""Chunks of a tile, made of its tokens: what stands for each, and the way back from its gradients.

Tokens are cut as `cutting.py` says, keys and queries are scaled; parameters are those of the tile's heads.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .cutting import Places


class Members(NamedTuple):
    """Tokens of chunks, `[batch, windows, chunks of a window, members, heads, dim]`."""

    query: Tensor
    key: Tensor
    value: Tensor


class Summaries(Protocol):
    """key, value: `[batch, chunks, heads, dim]`. bias: `[batch, chunks, heads]`, added to the logits, or `None`."""

    key: Tensor
    value: Tensor
    bias: Tensor | None

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Members
    ) -> tuple[Tensor | None, ...]:
        """Add to the gradients of the tokens.

        Args: of_key, of_value, of_bias: Gradients of the summaries.
        Returns: gradients of the parameters.
        """


def _weights(logits: Tensor, places: Places) -> Tensor:
    """Softmax over the members, `[batch, windows, chunks, members, heads]`."""
    if places.member is not None:  # a chunk without any has the mean of zeros
        logits = logits.masked_fill_(~places.member, torch.finfo(logits.dtype).min)
    return logits.softmax(3)


def _by_head(x: Tensor) -> Tensor:
    """`[batch, ..., heads, dim]` -> `[heads, batch * ..., dim]`."""
    return x.flatten(0, -3).transpose(0, 1)


def _like_tokens(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_by_head`."""
    return x.transpose(0, 1).reshape(like.shape)


def _pool(weight: Tensor, tokens: Tensor) -> Tensor:
    return (weight.unsqueeze(-1) * tokens).sum(3)


class ControlVariates:
    """Mean keys, and values at a proposal; with residual maps of the means or `None`."""

    bias = None

    def __init__(
        self,
        members: Members,
        places: Places,
        query_adapter: Tensor | None,
        key_adapter: Tensor | None,
        proposals: str,
        root: float,
    ) -> None:
        query, key, value = members
        self.members, self.share, self.proposals, self.root = members, places.share, proposals, root
        self.query_adapter, self.key_adapter = query_adapter, key_adapter
        self.is_single = key.shape[3] == 1
        self.centre = centre = key.squeeze(3) if self.is_single else key.sum(3).mul_(places.share)
        residual = None if key_adapter is None else _like_tokens(_by_head(centre) @ key_adapter, centre)
        self.key = (centre if residual is None else centre + residual).flatten(1, 2)
        if self.is_single:
            self.value = value.flatten(1, 3)
            return
        self.query_mean = None
        apart = residual  # of the proposal from the centre
        if proposals in ("sum", "mean"):
            self.query_mean = mean = query.sum(3).mul_(places.share * root)
            if query_adapter is not None:
                mean = mean + _like_tokens(_by_head(mean) @ query_adapter, mean)
            apart = mean if apart is None else apart + mean
            if proposals == "mean":
                apart = (apart - centre) / 2
        elif proposals == "none":
            apart = -centre
        # `mu . y - |y|^2 / 2` relative to the chunk's centre, which all members have in common, as one product.
        self.centred = key - centre.unsqueeze(3)
        self.apart = -self.centred if apart is None else apart.unsqueeze(3) - self.centred
        logits = torch.add(self.apart, self.centred, alpha=0.5).mul_(self.centred).sum(-1)
        self.weight = _weights(logits, places)
        self.value = _pool(self.weight, value).flatten(1, 2)

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Members
    ) -> tuple[Tensor | None, ...]:
        shape = self.centre.shape
        of_mean, of_value = of_key.reshape(shape), of_value.reshape(shape).unsqueeze(3)
        of_query_adapter = of_key_adapter = None
        if self.is_single:
            grads.value.add_(of_value)
        else:
            weight = self.weight
            of_weight = (self.members.value * of_value).sum(-1)
            of_logits = torch._softmax_backward_data(of_weight, weight, 3, weight.dtype).unsqueeze(-1)
            grads.value.addcmul_(weight.unsqueeze(-1), of_value)
            grads.key.addcmul_(of_logits, self.apart)
            if self.proposals != "none":
                of_proposal = (of_logits * self.centred).sum(3)
                if self.proposals == "mean":
                    of_proposal.div_(2)
                of_mean = of_mean + of_proposal
            if self.query_mean is not None:
                of_query = of_proposal
                if self.query_adapter is not None:
                    upstream = _by_head(of_query)
                    of_query_adapter = _by_head(self.query_mean).mT @ upstream
                    of_query = of_query + _like_tokens(upstream @ self.query_adapter.mT, of_query)
                grads.query.add_((of_query * self.share).unsqueeze(3))
        if self.key_adapter is not None:
            upstream = _by_head(of_mean)
            of_key_adapter = _by_head(self.centre).mT @ upstream
            of_mean = of_mean + _like_tokens(upstream @ self.key_adapter.mT, of_mean)
        grads.key.add_((of_mean * self.share).unsqueeze(3))
        return of_query_adapter, of_key_adapter


class Pooled:
    """Keys and values pooled with learned weights, residual maps and a mass (`ops/eva/learned.py`)."""

    def __init__(self, members: Members, places: Places, *maps: Tensor) -> None:
        _, key, value = members
        key_pooling, value_pooling, key_adapter, query_adapter, far_offset, far_slope, key_slope = maps
        self.members, self.maps = members, maps
        self.is_single = key.shape[3] == 1
        if self.is_single:
            pooled = key.squeeze(3)
            self.value = value.flatten(1, 3)
        else:
            self.pooling = torch.stack([key_pooling, value_pooling], -1)
            logits = torch.bmm(_by_head(key), self.pooling)
            logits = logits.unflatten(1, key.shape[:4]).movedim(0, 4)
            self.weights = [_weights(part, places) for part in logits.unbind(-1)]
            pooled = _pool(self.weights[0], key)
            self.value = _pool(self.weights[1], value).flatten(1, 2)
        self.pooled = _by_head(pooled)
        self.mapped = torch.baddbmm(self.pooled, self.pooled, key_adapter)
        read = torch.baddbmm(self.mapped, self.mapped, query_adapter.mT).add_(far_slope.unsqueeze(1))
        self.key = _like_tokens(read, pooled).flatten(1, 2)
        bias = torch.baddbmm(far_offset.view(-1, 1, 1), self.mapped, key_slope.unsqueeze(-1))
        self.bias = bias.squeeze(-1).T.reshape(self.key.shape[:-1])

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Members
    ) -> tuple[Tensor | None, ...]:
        assert of_bias is not None
        _, _, key_adapter, query_adapter, _, _, key_slope = self.maps
        _, key, value = self.members
        of_read, of_mass = _by_head(of_key), of_bias.flatten(0, 1).T.unsqueeze(-1)
        of_mapped = torch.baddbmm(of_read, of_read, query_adapter).addcmul_(of_mass, key_slope.unsqueeze(1))
        of_maps = {
            "key_adapter": self.pooled.mT @ of_mapped,
            "query_adapter": of_read.mT @ self.mapped,
            "far_offset": of_mass.sum((1, 2)),
            "far_slope": of_read.sum(1),
            "key_slope": (of_mass.mT @ self.mapped).squeeze(1),
        }
        shape = (*key.shape[:3], *key.shape[4:])
        of_pooled = torch.baddbmm(of_mapped, of_mapped, key_adapter.mT).transpose(0, 1).reshape(shape).unsqueeze(3)
        of_value = of_value.reshape(shape).unsqueeze(3)
        if self.is_single:
            grads.key.add_(of_pooled)
            grads.value.add_(of_value)
            none = torch.zeros_like(key_slope)
            return none, none, *of_maps.values()
        of_weights = (key * of_pooled).sum(-1), (value * of_value).sum(-1)
        of_logits = torch.stack(
            [
                torch._softmax_backward_data(of_weight, weight, 3, weight.dtype)
                for of_weight, weight in zip(of_weights, self.weights, strict=True)
            ],
            dim=-1,
        )
        grads.key.addcmul_(self.weights[0].unsqueeze(-1), of_pooled)
        grads.value.addcmul_(self.weights[1].unsqueeze(-1), of_value)
        of_logits = _by_head(of_logits)
        grads.key.add_(torch.bmm(of_logits, self.pooling.mT).unflatten(1, key.shape[:4]).movedim(0, 4))
        of_pooling = _by_head(key).mT @ of_logits
        return *of_pooling.unbind(-1), *of_maps.values()
