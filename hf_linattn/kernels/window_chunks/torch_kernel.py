"""`window_chunk_attention` in plain torch: some windows at a time, so that their logits stay in a core's caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attend.torch_kernel import attend_forward
from ..attention_state import AttentionState, merge_states
from ..cpu_matmul import product, suits_onednn

# Logits of a tile, per thread.
_TILE = {"cpu": 1 << 19}
_LARGE_TILE = 1 << 26
# How far from 1 the sum of the weights of a query may be, in units of rounding.
_ROUNDED = 64


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

    def part(self, groups: slice) -> WindowChunkInputs:
        """Of some groups, without the masks."""
        query, key, value, _, chunk_key, chunk_bias, chunk_value, *hidden = self
        of_window = query[groups], key[groups], value[groups], None
        return WindowChunkInputs(*of_window, chunk_key[groups], chunk_bias[groups], chunk_value[groups], *hidden)


class _Tile(NamedTuple):
    """Where a tile is, and its inputs: some groups, some windows and the chunks that they may read."""

    windows: tuple[slice, slice]
    chunks: tuple[slice, slice]
    inputs: WindowChunkInputs

    def logits(self) -> tuple[Tensor, Tensor]:
        """`[groups, windows, queries, keys]` and `[groups, windows, queries, chunks]`, also of what is hidden."""
        query, key, chunk_key, bias = self.inputs.query, self.inputs.key, self.inputs.chunk_key, self.inputs.chunk_bias
        query = query.to(bias.dtype)
        of_chunks = product(query.flatten(1, 2), chunk_key.to(bias.dtype).mT).add_(bias.unsqueeze(1))
        return query @ key.to(bias.dtype).mT, of_chunks.unflatten(1, query.shape[1:3])

    def seen(self, is_causal: bool) -> tuple[Tensor | None, Tensor]:
        """Which keys, broadcasting to `[groups, windows, queries, keys]` (`None`: all), and which chunks, `[groups,
        windows, 1, chunks]`, a query sees."""
        query, key, _, visible, chunk_key, _, _, hidden_from, hidden_to = self.inputs
        if is_causal:
            length, keys = query.shape[2], key.shape[2]
            past = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril_(keys - length)
            visible = past if visible is None else visible & past
        number = torch.arange(chunk_key.shape[1], device=query.device)
        read = (number < hidden_from[..., None]) | (number >= hidden_to[..., None])
        return visible, read.unsqueeze(2)


def _tiles(inputs: WindowChunkInputs, is_causal: bool) -> Iterator[_Tile]:
    query, chunks = inputs.query, inputs.chunk_key.shape[1]
    groups, windows, length, _ = query.shape
    budget = _TILE["cpu"] * torch.get_num_threads() if query.device.type == "cpu" else _LARGE_TILE
    per_window = length * (inputs.key.shape[2] + chunks)
    width = max(1, min(windows, budget // per_window))
    depth = max(1, budget // (per_window * width)) if width == windows else 1
    last = inputs.hidden_from.amax(0).tolist() if is_causal else []
    first = inputs.hidden_to.amin(0).tolist() if is_causal else []
    for start in range(0, groups, depth):
        group = slice(start, start + depth)
        for window in range(0, windows, width):
            some = slice(window, window + width)
            # Causal windows read nothing behind the hidden chunks, and only some of those before.
            count = min(chunks, max(last[some])) if is_causal and min(first[some]) >= chunks else chunks
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
    for tile in _tiles(inputs, is_causal):
        chunk_key = tile.inputs.chunk_key
        by_parts = query.device.type == "cpu" and not suits_onednn(
            chunk_key, tile.inputs.query[0, ..., 0].numel() * chunk_key[0].numel()
        )
        output[tile.windows], lse[tile.windows] = (_by_parts if by_parts else _at_once)(tile, is_causal)
    return output, lse


def _by_parts(tile: _Tile, is_causal: bool) -> AttentionState:
    """Windows and chunks by torch's flash kernel, and then as one."""
    wide = tile.inputs.chunk_bias.dtype
    query, key, value = (z.to(wide) for z in tile.inputs[:3])
    chunk_key, bias, chunk_value = (z.unsqueeze(1) for z in tile.inputs[4:7])
    visible, read = tile.seen(is_causal)
    if visible is not None:
        visible = visible.expand(*query.shape[:-1], -1)
    chunk_key, chunk_value = (z.to(wide).expand(-1, query.shape[1], -1, -1) for z in (chunk_key, chunk_value))
    bias = bias.masked_fill(~read.squeeze(2), float("-inf"))
    near = attend_forward(query, key, value, None, visible)
    far = attend_forward(query, chunk_key, chunk_value, bias, None)
    return merge_states([AttentionState(*near), AttentionState(*far)])


def _at_once(tile: _Tile, is_causal: bool) -> AttentionState:
    """All logits of the tile, by large products."""
    (in_window, of_chunks), (visible, read) = tile.logits(), tile.seen(is_causal)
    if visible is not None:
        in_window.masked_fill_(~visible, float("-inf"))
    of_chunks.masked_fill_(~read, float("-inf"))
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
    lse = total.log().add_(top).masked_fill_(empty, float("-inf"))
    return AttentionState(result.div_(total), lse.squeeze(-1))


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
    wide = results[1].dtype
    like = (*inputs[:3], *inputs[4:7])  # all but the masks
    tiles = list(_tiles(inputs, is_causal))
    found: list[Tensor | None]
    if len(tiles) == 1 and tiles[0].inputs.chunk_key.shape == inputs.chunk_key.shape:
        found = list(part_gradients(grads, inputs, results, needs, *tiles[0].seen(is_causal)))
        return [None if grad is None else grad.to(z.dtype) for grad, z in zip(found, like, strict=True)]
    found = [
        (torch.empty if i < 3 else torch.zeros)(z.shape, dtype=wide, device=z.device) if needed else None
        for i, (z, needed) in enumerate(zip(like, needs, strict=True))
    ]
    for tile in tiles:
        upstream = AttentionState(*(z[tile.windows] for z in grads))
        had = [z[tile.windows] for z in results]
        parts = part_gradients(upstream, tile.inputs, had, needs, *tile.seen(is_causal))
        for place, (whole, part) in enumerate(zip(found, parts, strict=True)):
            if whole is None or part is None:
                continue
            if place < 3:
                whole[tile.windows] = part
            else:
                whole[tile.chunks] += part
    return [None if grad is None else grad.to(z.dtype) for grad, z in zip(found, like, strict=True)]


def part_gradients(
    grads: AttentionState,
    inputs: WindowChunkInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    visible: Tensor | None,
    read: Tensor,
) -> tuple[Tensor | None, ...]:
    """`window_chunks_backward` of a part, at once, in the precision of the log-sum-exp.

    Args: visible, read: As `seen` of a tile returns them. The masks in `inputs` are not looked at.
    """
    output, lse = results
    wide = lse.dtype
    query, key, value = inputs.query.to(wide), inputs.key.to(wide), inputs.value.to(wide)
    chunk_key, chunk_bias = inputs.chunk_key.to(wide), inputs.chunk_bias.to(wide)
    chunk_value = inputs.chunk_value.to(wide)
    groups, windows, length, _ = query.shape

    def of_window(x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def of_group(x: Tensor) -> Tensor:
        return x.flatten(1, 2)

    def by_window(x: Tensor) -> Tensor:
        return x.view(groups, windows, length, -1)

    # Where nothing is visible all weights are 0. The gradient of the log-sum-exp may be NaN: it does not count.
    empty = lse == float("-inf")
    grad, grad_lse, lse = grads.output.to(wide), grads.lse.masked_fill(empty, 0.0), lse.masked_fill(empty, 0.0)
    shift = (grad * output).sum(-1).masked_fill_(empty, 0.0).sub_(grad_lse).unsqueeze(-1)
    lse = lse.unsqueeze(-1)
    # Hidden logits may be of any size. Their exponentials are multiplied by 0: that of -inf takes ten times as long.
    near = torch.bmm(of_window(query), of_window(key).mT).sub_(of_window(lse)).clamp_max_(0.0).exp_()
    far = product(of_group(query), chunk_key.mT).add_(chunk_bias.unsqueeze(1))
    far.sub_(of_group(lse)).clamp_max_(0.0).exp_()
    by_window(far).mul_(read)
    if visible is not None:
        by_window(near).mul_(visible)
    total = by_window(near).sum(-1, keepdim=True).add_(by_window(far).sum(-1, keepdim=True))
    total.masked_fill_(total == 0, 1.0)
    is_off = _is_off(total)
    if is_off:
        by_window(near).div_(total)
        by_window(far).div_(total)
    of_query = of_key = of_chunk_key = of_chunk_bias = None
    of_value = torch.bmm(near.mT, of_window(grad)).view(value.shape) if needs[2] else None
    of_chunk_value = torch.bmm(far.mT, of_group(grad)) if needs[5] else None
    if needs[0] or needs[1] or needs[3] or needs[4]:
        if is_off:
            of_near = by_window(near) * by_window(torch.bmm(of_window(grad), of_window(value).mT))
            of_far = by_window(far) * by_window(product(of_group(grad), chunk_value.mT))
            shift = of_near.sum(-1) + of_far.sum(-1) - grad_lse
            by_window(near).mul_(shift.unsqueeze(-1)).neg_().add_(of_near)
            by_window(far).mul_(shift.unsqueeze(-1)).neg_().add_(of_far)
        else:
            near.mul_(torch.bmm(of_window(grad), of_window(value).mT).sub_(of_window(shift)))
            far.mul_(product(of_group(grad), chunk_value.mT).sub_(of_group(shift)))
    if needs[0]:
        of_query = torch.bmm(near, of_window(key)).view(groups, windows * length, -1)
        of_query = _plus(of_query, far, chunk_key).view(query.shape)
    if needs[1]:
        of_key = torch.bmm(near.mT, of_window(query)).view(key.shape)
    if needs[3]:
        of_chunk_key = torch.bmm(far.mT, of_group(query))
    if needs[4]:
        of_chunk_bias = far.sum(1)
    return of_query, of_key, of_value, of_chunk_key, of_chunk_bias, of_chunk_value


def _is_off(total: Tensor) -> bool:
    """Whether sums of weights show that logits, which are large then, were rounded differently in the forward pass.

    Weights and `shift` are then found anew. Always, where looking would make a device wait.
    """
    if total.device.type != "cpu":
        return True
    least, most = total.aminmax()
    bound = _ROUNDED * torch.finfo(total.dtype).eps
    return not (1 - bound <= float(least) and float(most) <= 1 + bound)


def _plus(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right`, in place."""
    if suits_onednn(left, left.shape[1] * right.numel()):
        return total.add_(product(left, right))
    return total.baddbmm_(left, right)
