"""`short_chunk_attention` in plain torch, for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention_state import AttentionState
from .joined import Sizes, places, tiles


class ShortChunkInputs(NamedTuple):
    """Tensors of `short_chunk_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    chunk_key: Tensor
    proposal: Tensor
    centre: Tensor

    def of_tile(self, rows: slice, heads: slice) -> ShortChunkInputs:
        tokens, chunks = self[:3], self[3:]
        return ShortChunkInputs(*(z[rows, :, heads] for z in tokens), *(z[rows, heads] for z in chunks))


class _Pool(NamedTuple):
    """The members of chunks relative to its centre `[.., chunks of a window, members, dim]`, the proposals relative to
    them, and the weights."""

    centred: Tensor
    apart: Tensor
    weight: Tensor


def _pool(keys: Tensor, part: ShortChunkInputs, sizes: Sizes) -> _Pool:
    """Weights of the members of chunks, `[batch, windows, heads, chunks of a window, members]`."""
    windows = keys.shape[1]

    def of_windows(z: Tensor) -> Tensor:
        return z.unflatten(2, (windows, -1)).transpose(1, 2).unsqueeze(-2)

    centred = sizes.chunks(keys) - of_windows(part.centre)
    apart = of_windows(part.proposal) - centred
    # `mu . y - |y|^2 / 2`, as a product: `y . (mu - y / 2)`.
    logits = torch.add(apart, centred, alpha=0.5).mul_(centred).sum(-1)
    member = places(sizes, keys.dtype).member
    if member is not None:  # a chunk without any has the mean of zeros
        logits.masked_fill_(~member, torch.finfo(logits.dtype).min)
    return _Pool(centred, apart, logits.softmax(-1))


def _joined(part: ShortChunkInputs, sizes: Sizes, order: str) -> tuple[Tensor, Tensor, _Pool | None]:
    """Keys and values of every window, its own and the chunks: `[batch, windows, heads, keys + chunks, dim]`.

    Args: order: "windows" or "heads", which of them comes first in memory.
    """
    key, value, chunk_key = part[1:4]
    window, count = sizes.window, chunk_key.shape[2]
    own = sizes.cut(key)
    batch, windows, heads, _, dim = own.shape

    def room(like: Tensor) -> Tensor:
        if order == "heads":
            return like.new_empty(batch, heads, windows, window + count, dim).transpose(1, 2)
        return like.new_empty(batch, windows, heads, window + count, dim)

    keys, values = room(key), room(value)
    own_keys, own_values = keys[..., :window, :], values[..., :window, :]
    torch.mul(own, sizes.root, out=own_keys)
    own_values.copy_(sizes.cut(value))
    keys[..., window:, :] = chunk_key.unsqueeze(1)
    pool = None
    members = sizes.chunks(own_values)
    if sizes.chunk == 1:
        means = members.squeeze(-2)
    else:
        pool = _pool(own_keys, part, sizes)
        means = (pool.weight.unsqueeze(-1) * members).sum(-2)
    values[..., window:, :].unflatten(3, (windows, -1)).copy_(means.transpose(1, 2).unsqueeze(1))
    return keys, values, pool


def short_chunks_forward(inputs: ShortChunkInputs, *options: int | float) -> tuple[Tensor, Tensor]:
    """Output `[batch, places, heads, head_dim]` and log-sum-exp, as `short_chunk_attention` describes them."""
    sizes = Sizes(*options)
    query, value = inputs.query, inputs.value
    bias, all_tiles = places(sizes, query.dtype).bias, list(tiles(query, sizes))
    results = []
    for tile in all_tiles:
        part = inputs.of_tile(*tile)
        keys, values, _ = _joined(part, sizes, "windows")
        queries = sizes.cut(part.query)
        batch, windows = queries.shape[:2]
        mask = bias.repeat(batch, 1, 1, 1) if batch > 1 else bias
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries.flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            attn_mask=mask.expand(-1, queries.shape[2], sizes.window, -1),
            scale=sizes.root,
        )
        # The kernel's results have the order of tokens in memory.
        results.append([z.transpose(1, 2).reshape(batch, -1, *z.shape[1:2], *z.shape[3:]) for z in (output, lse)])
    if len(all_tiles) == 1:
        output, lse = results[0]
        return output.contiguous(), lse.contiguous()
    output = value.new_empty(query.shape)
    lse = value.new_empty(query.shape[:-1])
    for (rows, heads), (some, some_lse) in zip(all_tiles, results, strict=True):
        output[rows, :, heads], lse[rows, :, heads] = some, some_lse
    return output, lse


def short_chunks_backward(
    grads: AttentionState,
    inputs: ShortChunkInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    *options: int | float,
) -> list[Tensor | None]:
    """Gradients of query, key, value, chunk_key and proposal, where `needs` says so. Weights are computed again."""
    sizes = Sizes(*options)
    window, root = sizes.window, sizes.root
    bias = places(sizes, inputs.query.dtype).bias
    found = [z.new_empty(z.shape) for z in inputs[:5]]
    has_lse = bool(grads.lse.any())
    for rows, heads in tiles(inputs.query, sizes):
        part = inputs.of_tile(rows, heads)
        keys, values, pool = _joined(part, sizes, "heads")
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        batch, some, windows, width, dim = keys.shape

        def by_head(x: Tensor) -> Tensor:
            return sizes.cut(x).transpose(1, 2)

        query = torch.mul(by_head(part.query), root, out=keys.new_empty(batch, some, windows, window, dim))
        grad = by_head(grads.output[rows, :, heads]).contiguous()
        flat = (batch * some * windows, window)
        query, grad = query.view(*flat, dim), grad.view(*flat, dim)
        keys, values = keys.flatten(0, 2), values.flatten(0, 2)
        logits = torch.bmm(query, keys.mT)
        logits.view(-1, windows, window, width).add_(bias[:, 0])
        weights = logits.softmax(-1)
        of_logits = torch._softmax_backward_data(torch.bmm(grad, values.mT), weights, -1, weights.dtype)
        if has_lse:
            lse = by_head(grads.lse[rows, :, heads].unsqueeze(-1)).reshape(*flat, 1)
            of_logits.addcmul_(weights, lse)
        by_head(found[0][rows, :, heads]).copy_(torch.bmm(of_logits, keys).view(batch, some, windows, window, dim))
        found[0][rows, :, heads].mul_(root)

        def of_keys(weights: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
            own = torch.bmm(weights[..., :window].mT, read)
            rest = weights[..., window:].unflatten(0, (-1, windows)).flatten(1, 2)
            of_chunks = torch.bmm(rest.mT, read.unflatten(0, (-1, windows)).flatten(1, 2))
            return own.view(batch, some, windows, window, dim), of_chunks.view(batch, some, -1, dim)

        own_key, of_chunk_key = of_keys(of_logits, query)
        own_value, of_chunk_value = of_keys(weights, grad)
        if pool is None:
            found[4][rows, heads] = 0.0
            own_value += of_chunk_value.view(own_value.shape)
        else:
            _pool_backward(pool, part, sizes, of_chunk_value, own_key, own_value, found[4][rows, heads])
        found[3][rows, heads] = of_chunk_key
        torch.mul(own_key, root, out=by_head(found[1][rows, :, heads]))
        by_head(found[2][rows, :, heads]).copy_(own_value)
    return [grad if needed else None for grad, needed in zip(found, needs, strict=True)]


def _pool_backward(
    pool: _Pool,
    part: ShortChunkInputs,
    sizes: Sizes,
    grad: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    of_proposal: Tensor,
) -> None:
    """Add to the gradients of scaled keys and of values, `[batch, heads, windows, places, dim]`, and write that of the
    proposals, from that of the chunks' values `[batch, heads, chunks, dim]`."""
    weight, centred, apart = (z.transpose(1, 2) for z in (pool.weight, pool.centred, pool.apart))
    grad = grad.unflatten(2, (of_key.shape[2], -1)).unsqueeze(-2)
    members = sizes.chunks(sizes.cut(part.value).transpose(1, 2))
    of_logits = torch._softmax_backward_data((members * grad).sum(-1), weight, -1, weight.dtype).unsqueeze(-1)
    sizes.chunks(of_value).addcmul_(weight.unsqueeze(-1), grad)
    sizes.chunks(of_key).addcmul_(of_logits, apart)
    of_proposal.copy_((of_logits * centred).sum(-2).flatten(2, 3))
