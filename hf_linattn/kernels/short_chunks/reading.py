"""Windows and chunks of short inputs under one softmax, forward and backward, for CPUs.

Every window has its own keys and all chunks beside each other, so that all of it is one attention; the chunks that it
does not read are hidden by a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention_state import AttentionState
from .cutting import Places, Sizes, Tile, places, tiles
from .summaries import Members, Summaries

# Chunks of a tile, from its members and the parameters of its heads.
Summarise = Callable[[Members, Places, Sequence[Tensor | None]], Summaries]


class _Joined(NamedTuple):
    """`[batch, windows, keys + chunks, heads, dim]`, and the summaries among them."""

    keys: Tensor
    values: Tensor
    summaries: Summaries


def _of_tile(tensors: Sequence[Tensor | None], tile: Tile) -> tuple[list[Tensor], list[Tensor | None]]:
    """Tokens `[batch, places, heads, dim]` of a tile, and its parameters `[heads, ...]`."""
    parameters = [None if z is None else z[tile.parameters, tile.heads] for z in tensors[3:]]
    return [z[tile.rows, :, tile.heads] for z in tensors[:3]], parameters  # type: ignore[index]


def _joined(
    tokens: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    sizes: Sizes,
    summarise: Summarise,
    *,
    heads_first: bool,
) -> _Joined:
    """Keys and values of every window. heads_first: In memory heads come before windows."""
    query, key, value = (sizes.windows(z) for z in tokens)
    batch, windows, window, heads, _ = key.shape
    width = window + windows * (window // sizes.chunk)

    def room(like: Tensor) -> Tensor:
        if heads_first:
            return like.new_empty(batch, heads, windows, width, like.shape[-1]).permute(0, 2, 3, 1, 4)
        return like.new_empty(batch, windows, width, heads, like.shape[-1])

    keys, values = room(key), room(value)
    own_keys, own_values = keys[:, :, :window], values[:, :, :window]
    torch.mul(key, sizes.root, out=own_keys)
    own_values.copy_(value)
    members = Members(sizes.chunks(query), sizes.chunks(own_keys), sizes.chunks(own_values))
    summaries = summarise(members, places(sizes, key.dtype), parameters)
    keys[:, :, window:] = summaries.key.unsqueeze(1)
    values[:, :, window:] = summaries.value.unsqueeze(1)
    return _Joined(keys, values, summaries)


def read_forward(
    tensors: Sequence[Tensor | None], parameters: int, sizes: Sizes, summarise: Summarise
) -> tuple[Tensor, Tensor]:
    """Output `[batch, places, heads, head_dim]` and log-sum-exp.

    Args:
        tensors: Queries, keys and values `[batch, places, heads, head_dim]`, and `[parameters, heads, ...]`, each for
            as many rows.
    """
    query = tensors[0]
    assert query is not None
    shape, bias = query.shape, places(sizes, query.dtype).bias
    all_tiles = list(tiles(query, sizes, parameters))
    output = lse = query
    if len(all_tiles) > 1:
        output, lse = query.new_empty(shape), query.new_empty(shape[:-1])
    for tile in all_tiles:
        tokens, own = _of_tile(tensors, tile)
        keys, values, summaries = _joined(tokens, own, sizes, summarise, heads_first=False)
        batch, windows, width, heads, _ = keys.shape
        mask = bias
        if summaries.bias is not None:
            mask = bias.repeat(batch, heads, 1, 1)
            mask.view(batch, windows, heads, width)[..., sizes.window :] += summaries.bias.mT.unsqueeze(1)
        elif batch > 1:
            mask = bias.repeat(batch, 1, 1, 1)
        queries = sizes.windows(tokens[0])
        queries = queries if queries.stride(-1) == 1 else queries.contiguous()
        some, some_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries.flatten(0, 1).transpose(1, 2),
            keys.flatten(0, 1).transpose(1, 2),
            values.flatten(0, 1).transpose(1, 2),
            attn_mask=mask.expand(-1, heads, sizes.window, -1),
            scale=sizes.root,
        )
        # In memory these have the order of tokens.
        some, some_lse = some.transpose(1, 2).reshape(batch, -1, heads, shape[-1]), some_lse.transpose(1, 2)
        some_lse = some_lse.reshape(batch, -1, heads)
        if len(all_tiles) == 1:
            return some.contiguous(), some_lse.contiguous()
        output[tile.rows, :, tile.heads], lse[tile.rows, :, tile.heads] = some, some_lse
    return output, lse


def read_backward(
    grads: AttentionState,
    tensors: Sequence[Tensor | None],
    parameters: int,
    needs: Sequence[bool],
    sizes: Sizes,
    summarise: Summarise,
) -> list[Tensor | None]:
    """Gradients of the tensors, where `needs` says so. Weights are computed again."""
    query = tensors[0]
    assert query is not None
    found = [None if z is None else (torch.zeros if i > 2 else torch.empty)(z.shape, dtype=z.dtype) for i, z in enumerate(tensors)]
    has_lse = bool(grads.lse.any())
    for tile in tiles(query, sizes, parameters):
        tokens, own = _of_tile(tensors, tile)
        grad = grads.output[tile.rows, :, tile.heads]
        grad_lse = grads.lse[tile.rows, :, tile.heads] if has_lse else None
        of_tokens, of_own = _tile_backward(tokens, own, grad, grad_lse, sizes, summarise)
        for result, part, factor in zip(found, of_tokens, (sizes.root, sizes.root, 1.0), strict=False):
            torch.mul(part, factor, out=sizes.windows(result)[tile.rows, :, :, tile.heads])
        for result, part in zip(found[3:], of_own, strict=True):
            if result is not None and part is not None:
                result[tile.parameters, tile.heads] += part
    return [grad if needed else None for grad, needed in zip(found, needs, strict=True)]


def _tile_backward(
    tokens: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    grad: Tensor,
    grad_lse: Tensor | None,
    sizes: Sizes,
    summarise: Summarise,
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """Gradients of scaled queries and keys, and of values, `[batch, windows, places, heads, dim]`; of parameters."""
    keys, values, summaries = _joined(tokens, parameters, sizes, summarise, heads_first=True)
    batch, windows, width, heads, dim = keys.shape
    window, count = sizes.window, width - sizes.window
    keys, values = (z.permute(0, 3, 1, 2, 4).flatten(0, 2) for z in (keys, values))

    def by_head(x: Tensor) -> Tensor:
        """`[batch, places, heads, dim]` -> `[batch * heads * windows, window, dim]`."""
        return sizes.windows(x).permute(0, 3, 1, 2, 4).reshape(-1, window, x.shape[-1])

    def of_row(x: Tensor) -> Tensor:
        """All windows of a head of a row beside each other."""
        return x.unflatten(0, (-1, windows)).flatten(1, 2)

    query, grad = by_head(tokens[0]) * sizes.root, by_head(grad)
    logits = torch.bmm(query, keys.mT)
    logits.view(-1, windows, window, width).add_(places(sizes, keys.dtype).bias[:, 0])
    if summaries.bias is not None:
        bias = summaries.bias.transpose(1, 2).reshape(-1, 1, count)
        of_row(logits)[..., window:].add_(bias)
    weights = logits.softmax(-1)
    of_logits = torch._softmax_backward_data(torch.bmm(grad, values.mT), weights, -1, weights.dtype)
    if grad_lse is not None:
        of_logits.addcmul_(weights, by_head(grad_lse.unsqueeze(-1)))
    of_query = torch.bmm(of_logits, keys)
    of_key, of_value = torch.bmm(of_logits[..., :window].mT, query), torch.bmm(weights[..., :window].mT, grad)
    of_chunks = of_row(of_logits)[..., window:]
    of_chunk_key = torch.bmm(of_chunks.mT, of_row(query))
    of_chunk_value = torch.bmm(of_row(weights)[..., window:].mT, of_row(grad))

    def of_tokens(x: Tensor) -> Tensor:
        return x.view(batch, heads, windows, window, dim).permute(0, 2, 3, 1, 4)

    def of_summaries(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, heads)).transpose(1, 2)

    of = [of_tokens(x) for x in (of_query, of_key, of_value)]
    of_bias = None if summaries.bias is None else of_summaries(of_chunks.sum(1))
    of_parameters = summaries.backward(
        of_summaries(of_chunk_key), of_summaries(of_chunk_value), of_bias, Members(*(sizes.chunks(x) for x in of))
    )
    return of, of_parameters
