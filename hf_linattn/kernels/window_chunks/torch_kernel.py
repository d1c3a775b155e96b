"""`window_chunk_attention` in plain torch: some windows at a time, so that their logits stay in a core's caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..cpu_matmul import product

# Logits of a tile, per thread.
_TILE = {"cpu": 1 << 19}
_LARGE_TILE = 1 << 26


class WindowChunkInputs(NamedTuple):
    """Tensors of `window_chunk_attention`, all with their dimension of groups."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    chunk_key: Tensor
    chunk_bias: Tensor
    chunk_value: Tensor
    hidden_from: Tensor
    hidden_to: Tensor


class _Tile(NamedTuple):
    """Where a tile is, and its inputs: some groups, some windows and the chunks that they may read."""

    windows: tuple[slice, slice]
    chunks: tuple[slice, slice]
    inputs: WindowChunkInputs

    def logits(self, is_causal: bool) -> tuple[Tensor, Tensor]:
        """`[groups, windows, queries, keys]` and `[groups, windows, queries, chunks]`, `-inf` where hidden."""
        query, key, _, visible, chunk_key, chunk_bias, _, hidden_from, hidden_to = self.inputs
        wide = chunk_bias.dtype
        query = query.to(wide)
        in_window = query @ key.to(wide).mT
        if visible is not None:
            in_window.masked_fill_(~visible, float("-inf"))
        if is_causal:
            length, keys = in_window.shape[-2:]
            past = torch.ones(length, keys, dtype=torch.bool, device=in_window.device).tril_(keys - length)
            in_window.masked_fill_(~past, float("-inf"))
        of_chunks = product(query.flatten(1, 2), chunk_key.to(wide).mT)
        number = torch.arange(chunk_key.shape[1], device=in_window.device)
        hidden = (number >= hidden_from[..., None]) & (number < hidden_to[..., None])
        bias = chunk_bias.unsqueeze(1).masked_fill(hidden, float("-inf"))
        return in_window, of_chunks.unflatten(1, query.shape[1:3]).add_(bias.unsqueeze(2))


def _tiles(inputs: WindowChunkInputs) -> Iterator[_Tile]:
    query, chunks = inputs.query, inputs.chunk_key.shape[1]
    groups, windows, length, _ = query.shape
    budget = _TILE["cpu"] * torch.get_num_threads() if query.device.type == "cpu" else _LARGE_TILE
    per_window = length * (inputs.key.shape[2] + chunks)
    width = max(1, min(windows, budget // per_window))
    depth = max(1, budget // (per_window * width)) if width == windows else 1
    last, first = inputs.hidden_from.amax(0).tolist(), inputs.hidden_to.amin(0).tolist()
    for start in range(0, groups, depth):
        group = slice(start, start + depth)
        for window in range(0, windows, width):
            some = slice(window, window + width)
            # Causal windows read nothing behind the hidden chunks, and only some of those before.
            count = min(chunks, max(last[some])) if min(first[some]) >= chunks else chunks
            place, read = (group, some), (group, slice(0, count))
            visible = None if inputs.visible is None else inputs.visible[place]
            of_window = (inputs.query[place], inputs.key[place], inputs.value[place], visible)
            of_chunks = (inputs.chunk_key[read], inputs.chunk_bias[read], inputs.chunk_value[read])
            hidden = inputs.hidden_from[place], inputs.hidden_to[place]
            yield _Tile(place, read, WindowChunkInputs(*of_window, *of_chunks, *hidden))


def window_chunks_forward(inputs: WindowChunkInputs, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Output `[groups, windows, queries, head_dim]` and log-sum-exp, as `window_chunk_attention` describes them."""
    query, value = inputs.query, inputs.value
    output = value.new_empty(*query.shape[:-1], value.shape[-1])
    lse = inputs.chunk_bias.new_empty(query.shape[:-1])
    for tile in _tiles(inputs):
        in_window, of_chunks = tile.logits(is_causal)
        top = in_window.amax(-1, keepdim=True)
        if of_chunks.shape[-1]:
            top = torch.maximum(top, of_chunks.amax(-1, keepdim=True))
        top.clamp_min_(torch.finfo(top.dtype).min)
        in_window.sub_(top).exp_()
        of_chunks.sub_(top).exp_()
        total = in_window.sum(-1, keepdim=True) + of_chunks.sum(-1, keepdim=True)
        empty = total == 0
        total.masked_fill_(empty, 1.0)
        values, chunk_values = tile.inputs.value.to(top.dtype), tile.inputs.chunk_value.to(top.dtype)
        result = in_window @ values
        result += product(of_chunks.flatten(1, 2), chunk_values).view_as(result)
        output[tile.windows] = result.div_(total)
        row_lse = total.log_().add_(top).masked_fill_(empty, float("-inf"))
        lse[tile.windows] = row_lse.squeeze(-1)
    return output, lse


def window_chunks_backward(
    grads: AttentionState,
    inputs: WindowChunkInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    is_causal: bool,
) -> list[Tensor | None]:
    """Gradients of query, key, value, chunk_key, chunk_bias and chunk_value, where `needs` says so.

    Weights are relative to the joint log-sum-exp, so each part's gradients are those of an attention with these
    results.
    """
    output, lse = results
    wide = lse.dtype
    like = (*inputs[:3], *inputs[4:7])  # all but the masks
    found = [
        (torch.empty if i < 3 else torch.zeros)(z.shape, dtype=wide, device=z.device) if needed else None
        for i, (z, needed) in enumerate(zip(like, needs, strict=True))
    ]
    for tile in _tiles(inputs):
        part, (in_window, of_chunks) = tile.inputs, tile.logits(is_causal)
        row_lse = lse[tile.windows].unsqueeze(-1)
        # Where nothing is visible all weights are 0. The gradient of the log-sum-exp may be NaN: it does not count.
        empty = row_lse == float("-inf")
        row_lse = row_lse.masked_fill(empty, 0.0)
        in_window.sub_(row_lse).exp_()
        of_chunks = of_chunks.sub_(row_lse).exp_().flatten(1, 2)
        queries, grad = part.query.to(wide), grads.output[tile.windows].to(wide)
        flat_queries, flat_grad = queries.flatten(1, 2), grad.flatten(1, 2)
        if found[2] is not None:
            found[2][tile.windows] = in_window.mT @ grad
        if found[5] is not None:
            found[5][tile.chunks].baddbmm_(of_chunks.mT, flat_grad)
        if not (needs[0] or needs[1] or needs[3] or needs[4]):
            continue
        shift = (grad * output[tile.windows].to(wide)).sum(-1, keepdim=True) - grads.lse[tile.windows].unsqueeze(-1)
        shift.masked_fill_(empty, 0.0)
        in_window.mul_((grad @ part.value.to(wide).mT).sub_(shift))
        of_chunks.mul_(product(flat_grad, part.chunk_value.to(wide).mT).sub_(shift.flatten(1, 2)))
        if found[0] is not None:
            of_query = in_window @ part.key.to(wide)
            found[0][tile.windows] = of_query.add_(product(of_chunks, part.chunk_key.to(wide)).view_as(of_query))
        if found[1] is not None:
            found[1][tile.windows] = in_window.mT @ queries
        if found[3] is not None:
            found[3][tile.chunks].baddbmm_(of_chunks.mT, flat_queries)
        if found[4] is not None:
            found[4][tile.chunks] += of_chunks.sum(1)
    return [None if grad is None else grad.to(z.dtype) for grad, z in zip(found, like, strict=True)]
