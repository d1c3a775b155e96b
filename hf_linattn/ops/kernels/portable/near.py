r"""`near` in plain torch: causal attention through slots inside chunks, without forming the slots.

Query t reads key n <= t of its chunk with weight `exp(l[t, n])`, `l[t, n] = logsumexp_j(a[t, j] + c[j, n])`: a product
of two feature matrices, if a stabiliser is taken off the keys, the largest `c[j, n]` of each slot. Where the keys of
a chunk differ so much that one which a query cannot see could make those it sees underflow, the chunk is cut into
halves: all queries of a right half see all keys of the left one. Then no maximum is that of a hidden key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the logits that are computed at a time.
_TILE = {"cpu": 1 << 19}
_LARGE_TILE = 1 << 25


class _Side(NamedTuple):
    """Tokens `[groups, tokens, dim]`, their bias `[groups, tokens]`, slots `[groups, slots, dim]`, their bias."""

    tokens: Tensor
    bias: Tensor
    slots: Tensor
    slot_bias: Tensor

    def logits(self, group: slice, part: slice, chunk: int) -> Tensor:
        """`[groups, chunks, chunk, slots]` in the precision of the bias."""
        wide = self.bias.dtype
        tokens, slots = self.tokens[group, part].to(wide), self.slots[group].to(wide)
        logits = torch.baddbmm(self.slot_bias[group].unsqueeze(1), tokens, slots.transpose(-1, -2))
        return logits.add_(self.bias[group, part].unsqueeze(-1)).unflatten(1, (-1, chunk))


class _Pair(NamedTuple):
    """Features of queries and keys that meet, `[..., queries, slots]` and `[..., keys, slots]`, all in [0, 1].

    The weight of a pair is `exp(top)` times their product, `[..., queries, keys]`; hidden pairs have product 0.
    """

    query: Tensor
    key: Tensor
    product: Tensor
    top: Tensor


def near_forward(
    x: Tensor,
    x_bias: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    y: Tensor,
    y_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    value: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Output and log mass of every query.

    Args:
        x, y: `[groups, tokens, dim]`, tokens a multiple of `chunk`; their biases `[groups, tokens]`, -inf for a key
            that nothing reads.
        query_slots, key_slots: `[groups, slots, dim]`; their biases `[groups, slots]`.
        value: `[groups, tokens, head_dim]`.
        chunk: Tokens of a chunk, a power of two.
    """
    output = value.new_empty(*x.shape[:-1], value.shape[-1])
    log_mass = x_bias.new_empty(x.shape[:-1])
    queries, keys = _Side(x, x_bias, query_slots, query_slot_bias), _Side(y, y_bias, key_slots, key_slot_bias)
    for group, part in _tiles(x, query_slots, chunk):
        a, c = queries.logits(group, part, chunk), keys.logits(group, part, chunk)
        values = value[group, part].unflatten(1, (-1, chunk)).to(a.dtype)
        if _is_narrow(c):
            out, mass = _read(_pair(a, c, is_causal=True), values)
        else:
            out, mass = _tree(a, c, values)
        output[group, part], log_mass[group, part] = out.flatten(1, 2), mass.flatten(1, 2)
    return output, log_mass


def near_backward(
    grad_output: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    x_bias: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    y: Tensor,
    y_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    value: Tensor,
    output: Tensor,
    log_mass: Tensor,
    needs: list[bool],
    chunk: int,
) -> list[Tensor | None]:
    """Gradients of the nine tensors of `near_forward`, where `needs` says so."""
    wide = log_mass.dtype
    queries, keys = _Side(x, x_bias, query_slots, query_slot_bias), _Side(y, y_bias, key_slots, key_slot_bias)
    found = [
        torch.zeros(z.shape, dtype=wide, device=z.device) if n else None
        for z, n in zip([*queries, *keys, value], needs, strict=True)
    ]
    shift = (grad_output.to(wide) * output.to(wide)).sum(-1) - grad_mass
    # The log mass with which weights are normalised; of a query that sees nothing all weights are 0 anyway.
    mass = log_mass.masked_fill(log_mass == float("-inf"), 0.0)
    for group, part in _tiles(x, query_slots, chunk):
        a, c = queries.logits(group, part, chunk), keys.logits(group, part, chunk)
        values, grads = (z[group, part].unflatten(1, (-1, chunk)).to(wide) for z in (value, grad_output))
        row_shift, row_mass = (z[group, part].unflatten(1, (-1, chunk)) for z in (shift, mass))
        if _is_narrow(c):
            grad_a, grad_c, grad_values = _gradients(_pair(a, c, is_causal=True), values, grads, row_shift, row_mass)
        else:
            grad_a, grad_c, grad_values = _tree_gradients(a, c, values, grads, row_shift, row_mass)
        _add_side(found[:4], queries, grad_a.flatten(1, 2), group, part)
        _add_side(found[4:8], keys, grad_c.flatten(1, 2), group, part)
        if found[8] is not None:
            found[8][group, part] = grad_values.flatten(1, 2)
    like = [*queries, *keys, value]
    return [None if grad is None else grad.to(z.dtype) for grad, z in zip(found, like, strict=True)]


def _add_side(found: list[Tensor | None], side: _Side, grad: Tensor, group: slice, part: slice) -> None:
    tokens, bias, slots, slot_bias = found
    wide = grad.dtype
    if tokens is not None:
        tokens[group, part] = grad @ side.slots[group].to(wide)
    if bias is not None:
        bias[group, part] = grad.sum(-1)
    if slots is not None:
        slots[group] += grad.transpose(-1, -2) @ side.tokens[group, part].to(wide)
    if slot_bias is not None:
        slot_bias[group] += grad.sum(-2)


def _tiles(x: Tensor, slots: Tensor, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Some groups and some whole chunks at a time."""
    groups, tokens, _ = x.shape
    rows = max(1, _TILE.get(x.device.type, _LARGE_TILE) // max(slots.shape[1], chunk))
    per_tile = max(1, min(tokens, rows) // chunk) * chunk
    per_group = max(1, rows // per_tile)
    for group in range(0, groups, per_group):
        for start in range(0, tokens, per_tile):
            yield slice(group, group + per_group), slice(start, start + per_tile)


# -- one chunk as a whole --------------------------------------------------------------------------------------------


def _is_narrow(c: Tensor) -> bool:
    """Whether in every slot the keys of a chunk differ by so little that the features of none underflow."""
    lowest = c.amin(-2)
    if bool((lowest == float("-inf")).any()):
        lowest = c.masked_fill(c == float("-inf"), float("inf")).amin(-2)
    # e^-28 of the largest weight is below the rounding of float32; float64 has room to spare.
    room = -math.log(torch.finfo(c.dtype).tiny) - 28
    return bool((c.amax(-2) - lowest).amax() <= room)


def _pair(a: Tensor, c: Tensor, *, is_causal: bool) -> _Pair:
    slot_top = c.amax(-2, keepdim=True).clamp_min_(torch.finfo(c.dtype).min)
    query = a + slot_top
    top = query.amax(-1, keepdim=True)
    query.sub_(top).exp_()
    key = (c - slot_top).exp_()
    product = query @ key.transpose(-1, -2)
    return _Pair(query, key, product.tril_() if is_causal else product, top.squeeze(-1))


def _read(pair: _Pair, values: Tensor) -> tuple[Tensor, Tensor]:
    total = pair.product.sum(-1)
    empty = total == 0
    total.masked_fill_(empty, 1.0)
    output = (pair.product @ values).div_(total.unsqueeze(-1))
    return output, total.log_().add_(pair.top).masked_fill_(empty, float("-inf"))


def _gradients(
    pair: _Pair, values: Tensor, grads: Tensor, shift: Tensor, mass: Tensor, *, is_causal: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the logits of queries and keys and of the values.

    The weight of a pair is `p = product exp(top - mass)`; the gradient of its log `p (grad . value - shift)` is shared
    by the slots in proportion to their part of the product, which cancels: only `exp(top - mass)` is left.
    """
    scale = (pair.top - mass).exp_().unsqueeze(-1)
    grad_values = pair.product.transpose(-1, -2) @ (grads * scale)
    weight = (grads @ values.transpose(-1, -2)).sub_(shift.unsqueeze(-1)).mul_(scale)
    weight = weight.tril_() if is_causal else weight
    grad_query = (weight @ pair.key).mul_(pair.query)
    grad_key = (weight.transpose(-1, -2) @ pair.query).mul_(pair.key)
    return grad_query, grad_key, grad_values


# -- a chunk as a tree of halves -------------------------------------------------------------------------------------


def _halves(z: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Left and right halves of stretches of `2 * half` tokens (dimension 2), as views."""
    z = z.unflatten(2, (-1, 2, half))
    return z[:, :, :, 0], z[:, :, :, 1]


def _tree(a: Tensor, c: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    own = a + c
    mass = own.logsumexp(-1)
    output = values.masked_fill((mass == float("-inf")).unsqueeze(-1), 0.0)
    half = 1
    while half < a.shape[2]:
        out, own_mass = _read(
            _pair(_halves(a, half)[1], _halves(c, half)[0], is_causal=False), _halves(values, half)[0]
        )
        right, right_mass = _halves(output, half)[1], _halves(mass, half)[1]
        joined = torch.logaddexp(right_mass, own_mass)
        finite = joined.masked_fill(joined == float("-inf"), 0.0)
        right.lerp_(out, (own_mass - finite).exp_().unsqueeze(-1))
        right_mass.copy_(joined)
        half *= 2
    return output, mass


def _tree_gradients(
    a: Tensor, c: Tensor, values: Tensor, grads: Tensor, shift: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (a + c).sub_(mass.unsqueeze(-1)).exp_()
    grad_values = grads * weights.sum(-1, keepdim=True)
    grad_a = weights.mul_(((grads * values).sum(-1) - shift).unsqueeze(-1))
    grad_c = grad_a.clone()
    half = 1
    while half < a.shape[2]:
        pair = _pair(_halves(a, half)[1], _halves(c, half)[0], is_causal=False)
        found = _gradients(
            pair,
            _halves(values, half)[0],
            _halves(grads, half)[1],
            _halves(shift, half)[1],
            _halves(mass, half)[1],
            is_causal=False,
        )
        _halves(grad_a, half)[1].add_(found[0])
        _halves(grad_c, half)[0].add_(found[1])
        _halves(grad_values, half)[0].add_(found[2])
        half *= 2
    return grad_a, grad_c, grad_values
