r"""Windows and slots under one softmax, in plain torch on a CPU.

Query t of window i has the logits `x_t . y_n` of the keys of its window and, for each slot j, `a[t, j] + b[i, j]` with
the log-mass `b` of the keys outside of the window. With a reference `r_j` these are sums over the other windows k,

    S[k, j] = sum_{n in k} exp(c[j, n] - r_j) v_n        z[k, j] = sum_{n in k} exp(c[j, n] - r_j)
    Z[i, j] = sum_{k != i} z[k, j]      U[i, j] = sum_{k != i} S[k, j] / Z[i, j]      b[i, j] = r_j + log Z[i, j]

one product with a matrix of ones and a diagonal of zeros: nothing is ever subtracted. One softmax over both sorts of
logits, and one product with values and `U`, follow. The references are constants, and drop out of the derivatives.

`r_j` is the largest `c[j, n]` of the row. It may belong to a key of the window itself, beside which what the others
hold underflows; and where logits are large, their sum is rounded more than the parts. Both are looked for, and such
inputs are computed again in float64 with a reference for every window (`_own_references`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention_state import AttentionState
from .inputs import OF_TOKENS, ShortInputs, Tile, tiles
from .workspace import scratch

# The least mass of the other windows, relative to the largest weight of all: e^-28 of it, below the rounding of
# float32, is still above the smallest number.
_LEAST_MASS = math.exp(-59)
# Logits of float32 up to this size are rounded by 3e-5 at most.
_LARGEST = 512.0


def short_forward(inputs: ShortInputs, places: int, has_hidden: bool, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `short_slot_attention` describes them."""
    query, value = inputs.query, inputs.value
    output = value.new_empty(*query.shape[:-1], value.shape[-1])
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full(query.shape[:-1], float("nan"), dtype=wide)
    for tile in tiles(inputs, places):
        read = _read(tile, has_hidden)
        tile.cut.write_tokens(output, read.output())
        if with_lse:
            tile.cut.write_tokens(lse, read.lse())
    return output, lse


def short_backward(
    grads: AttentionState,
    inputs: ShortInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    places: int,
    has_hidden: bool,
    with_lse: bool,
) -> list[Tensor | None]:
    """Gradients of the tensors of `inputs`, where `needs` says so. Weights are computed again, tile by tile."""
    wide = results[1].dtype
    found = [
        torch.zeros(z.shape, dtype=wide) if needed and z is not None else None
        for z, needed in zip(inputs, needs, strict=True)
    ]
    for tile in tiles(inputs, places):
        read = _read(tile, has_hidden)
        dtype, grad_lse = read.weights.dtype, None
        grad_output = tile.cut.tokens_of(grads.output, "grad_output").to(dtype)
        if with_lse:
            grad_lse = tile.cut.tokens_of(grads.lse, "grad_lse").to(dtype)
        of_tile = _gradients(read, grad_output, grad_lse, needs)
        for number, (total, grad) in enumerate(zip(found, of_tile, strict=True)):
            if total is None or grad is None:
                continue
            if number < OF_TOKENS:
                tile.cut.write_tokens(total, grad)
            else:
                tile.cut.add_slots(total, grad)
    return [None if grad is None or z is None else grad.to(z.dtype) for grad, z in zip(found, inputs, strict=True)]


# -- what queries read -----------------------------------------------------------------------------------------------
class _References(NamedTuple):
    """References of slots, and how sums of windows that are relative to them are summed over the others of each.

    own: `[groups, rows, windows or 1, slots]`, of what a window holds.
    others: The same, of what a window reads.
    merge: `[groups * rows, windows, slots, n]` -> the same, for every window the sum of the others; perhaps in memory
        by a name.
    merge_back: Its transpose.
    """

    own: Tensor
    others: Tensor
    merge: Callable[[Tensor, str], Tensor]
    merge_back: Callable[[Tensor, str], Tensor]


class _Read(NamedTuple):
    """What the queries of a tile read; `n` counts windows of all its groups and rows.

    weights: `[n, places, places + slots]`, of the keys of the window and of the slots; each query's add up to one.
    logits: Of which they are the softmax.
    features: `[n, places, slots]`, weights of keys relative to the references.
    slot_values: `U`, `[n, slots, head_dim]`. mass: `Z`, `[n, slots, 1]`, 1 for none. values: `[n, places, head_dim]`.
    """

    tile: Tile
    references: _References
    weights: Tensor
    logits: Tensor
    features: Tensor
    slot_values: Tensor
    mass: Tensor
    values: Tensor

    def output(self) -> Tensor:
        """`[groups, rows, tokens, head_dim]`."""
        places = self.tile.places
        output = torch.bmm(
            self.weights[..., :places], self.values, out=scratch("output", self.values, *self.values.shape)
        )
        output.baddbmm_(self.weights[..., places:], self.slot_values)
        return output.view(*self.tile.inputs.query.shape[:3], -1)

    def lse(self) -> Tensor:
        """`[groups, rows, tokens]`: the largest logit minus the log of its weight."""
        largest = self.logits.amax(-1)
        lse = largest - self.weights.amax(-1).log_()
        lse.masked_fill_(largest == float("-inf"), float("-inf"))
        return lse.view(self.tile.inputs.query.shape[:3])


def _read(tile: Tile, has_hidden: bool) -> _Read:
    inputs = tile.inputs
    wide = torch.promote_types(inputs.query.dtype, torch.float32)
    if inputs.query.dtype != wide or inputs.value.dtype != wide:
        tile = tile._replace(inputs=_converted(inputs, wide))
    has_hidden = has_hidden or bool(tile.cut.missing)
    read = _attempt(tile, has_hidden, _row_references)
    if read is None:
        tile = tile._replace(inputs=_converted(inputs, torch.float64))
        read = _attempt(tile, has_hidden, _own_references)
        assert read is not None
    return read


def _converted(inputs: ShortInputs, dtype: torch.dtype) -> ShortInputs:
    return ShortInputs(*(None if z is None else z.to(dtype) for z in inputs))  # type: ignore[arg-type]


def _attempt(tile: Tile, has_hidden: bool, references_of: Callable[[Tensor, Tile, bool], _References]) -> _Read | None:
    """`None` where references of the row leave too few digits."""
    inputs, places, windows = tile.inputs, tile.places, tile.windows
    groups, rows, tokens, dim = inputs.query.shape
    slots, number = inputs.query_slots.shape[1], groups * rows * windows
    key_tokens = inputs.key if inputs.key_tokens is None else inputs.key_tokens
    log_features = _logits("features", key_tokens, inputs.key_slots, inputs.key_bias)
    references = references_of(log_features, tile, has_hidden)
    by_window = log_features.view(groups, rows, windows, places, slots)
    features = by_window.sub_(references.own.unsqueeze(3)).exp_().view(number, places, slots)

    values = inputs.value.view(number, places, -1)
    sums = torch.bmm(features.mT, values, out=scratch("sums", values, number, slots, values.shape[-1]))
    sums = sums.view(groups * rows, windows, slots, -1)
    mass = references.merge(features.sum(1).view(groups * rows, windows, slots, 1), "mass")
    is_rough = references_of is _row_references
    if is_rough and not _is_safe(mass, references.own, tile, has_hidden=has_hidden):
        return None
    log_mass = mass.log().view(groups, rows, windows, 1, slots)
    if has_hidden:
        mass.masked_fill_(mass == 0, 1.0)
    mass = mass.view(number, slots, 1)
    slot_values = references.merge(sums, "slot values").view(number, slots, -1).div_(mass)

    slot_bias = (inputs.query_slot_bias + inputs.key_slot_bias).view(groups, 1, 1, 1, slots)
    query_tokens = inputs.query if inputs.query_tokens is None else inputs.query_tokens
    of_slots = _logits("of slots", query_tokens, inputs.query_slots, inputs.query_bias)
    of_slots = of_slots.view(groups, rows, windows, places, slots)
    of_slots += log_mass + (references.others.unsqueeze(3) + slot_bias)
    query, key = inputs.query.view(number, places, dim), inputs.key.view(number, places, dim)
    in_window = torch.bmm(query, key.mT, out=scratch("in window", query, number, places, places))
    if has_hidden:
        in_window.masked_fill_((inputs.key_bias == float("-inf")).view(number, 1, places), float("-inf"))
    shape = (number, places, places + slots)
    logits = torch.cat([in_window, of_slots.view(number, places, slots)], -1, out=scratch("logits", values, *shape))
    weights = torch.softmax(logits, -1, out=scratch("weights", values, *shape))
    if has_hidden:  # perhaps nothing to see
        weights.masked_fill_(logits.amax(-1, keepdim=True) == float("-inf"), 0.0)
    return _Read(tile, references, weights, logits, features, slot_values, mass, values)


def _logits(name: str, tokens: Tensor, slots: Tensor, bias: Tensor) -> Tensor:
    """`tokens . slots + bias`, `[groups, rows, tokens, slots]`, in memory by that name."""
    groups, rows, count, dim = tokens.shape
    bias, tokens = bias.view(groups, rows * count, 1), tokens.view(groups, rows * count, dim)
    logits = torch.baddbmm(bias, tokens, slots.mT, out=scratch(name, tokens, groups, rows * count, slots.shape[1]))
    return logits.view(groups, rows, count, -1)


def _is_safe(mass: Tensor, reference: Tensor, tile: Tile, *, has_hidden: bool) -> bool:
    """Whether no sum has lost what counts, and no logit is large."""
    bias = tile.inputs.query_bias
    for logits in (reference, bias):
        least, most = torch.aminmax(logits)
        if not (-_LARGEST <= float(least) and float(most) <= _LARGEST):
            return False
    if float(mass.amin()) >= _LEAST_MASS:
        return True
    if not has_hidden:
        return False
    groups, rows, _ = bias.shape
    is_real = (tile.inputs.key_bias > float("-inf")).view(groups * rows, tile.windows, tile.places).any(-1)
    has_others = _others(tile.windows, mass.dtype) @ is_real.unsqueeze(-1).to(mass.dtype) > 0
    return not bool(((mass < _LEAST_MASS) & has_others.unsqueeze(-1)).any())


@functools.lru_cache(maxsize=128)
def _others(windows: int, dtype: torch.dtype) -> Tensor:
    """`[windows, windows]`, 1 for another window."""
    return 1 - torch.eye(windows, dtype=dtype)


def _row_references(log_features: Tensor, tile: Tile, has_hidden: bool) -> _References:
    """The largest of a row."""
    windows = tile.windows
    largest = log_features.amax(2, keepdim=True)
    if has_hidden:
        largest.masked_fill_(largest == float("-inf"), 0.0)
    others = _others(windows, largest.dtype)

    def merge(sums: Tensor, name: str) -> Tensor:
        flat = sums.flatten(2)
        merged = torch.bmm(others.expand(sums.shape[0], windows, windows), flat, out=scratch(name, flat, *flat.shape))
        return merged.view(sums.shape)

    return _References(largest, largest, merge, merge)


def _own_references(log_features: Tensor, tile: Tile, has_hidden: bool) -> _References:
    """The largest of every window, and the largest of all the others."""
    groups, rows, _, slots = log_features.shape
    windows, lowest = tile.windows, torch.finfo(log_features.dtype).min
    own = log_features.view(groups, rows, windows, tile.places, slots).amax(3).clamp_min_(lowest)
    is_other = _others(windows, own.dtype).bool()[..., None]
    others = own.unsqueeze(2).masked_fill(~is_other, lowest).amax(3)  # [groups, rows, windows, slots]
    shares = (own.unsqueeze(2) - others.unsqueeze(3)).exp().masked_fill(~is_other, 0.0).flatten(0, 1)

    def merge(sums: Tensor, name: str) -> Tensor:
        return torch.einsum("gikm,gkmd->gimd", shares, sums).contiguous()

    def merge_back(grads: Tensor, name: str) -> Tensor:
        return torch.einsum("gikm,gimd->gkmd", shares, grads).contiguous()

    return _References(own, others, merge, merge_back)


# -- derivatives -----------------------------------------------------------------------------------------------------
def _gradients(
    read: _Read, grad_output: Tensor, grad_lse: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the inputs of a tile, of tokens as `[groups, rows, tokens(, dim)]`."""
    tile = read.tile
    inputs, places, shape = tile.inputs, tile.places, tile.inputs.query.shape
    number, _, slots = read.features.shape
    groups, count = shape[0], shape[1] * shape[2]
    grad_output = grad_output.view(number, places, -1)
    # Of logits: in the window, and of slots.
    pairs = [torch.bmm(grad_output, z.mT) for z in (read.values, read.slot_values)]
    of_weights = torch.cat(pairs, -1, out=scratch("logits", read.values, *read.weights.shape))
    grad_logits = torch._softmax_backward_data(of_weights, read.weights, -1, read.weights.dtype)
    if grad_lse is not None:
        sees = read.weights.any(-1, keepdim=True)
        grad_lse = grad_lse.view(number, places, 1).masked_fill(~sees, 0.0)
        grad_logits.addcmul_(read.weights, grad_lse)
    in_window, of_slots = grad_logits[..., :places], grad_logits[..., places:]
    # Of what the slots hold, back to the keys.
    grad_values = torch.bmm(read.weights[..., :places].mT, grad_output)
    grad_slots = torch.bmm(read.weights[..., places:].mT, grad_output)
    grad_slot_bias = of_slots.sum(1)
    grad_mass = (grad_slot_bias.unsqueeze(-1) - (grad_slots * read.slot_values).sum(-1, keepdim=True)) / read.mass
    grad_slots.div_(read.mass)
    by_row = (shape[0] * shape[1], tile.windows, slots, -1)
    grad_slots, grad_mass = (
        read.references.merge_back(z.view(by_row), name).reshape(number, slots, -1)
        for z, name in ((grad_slots, "slot values, back"), (grad_mass, "mass, back"))
    )
    grad_features = torch.baddbmm(grad_mass.mT, read.values, grad_slots.mT)
    grad_values.baddbmm_(read.features, grad_slots)
    of_features = grad_features.mul_(read.features)

    query, key = inputs.query.view(number, places, -1), inputs.key.view(number, places, -1)
    grad_query, grad_key = torch.bmm(in_window, key), torch.bmm(in_window.mT, query)
    of_slots, of_features = of_slots.reshape(groups, count, slots), of_features.view(groups, count, slots)
    grad_query_tokens, grad_query = _through_slots(of_slots, inputs.query_slots, grad_query, inputs.query_tokens)
    grad_key_tokens, grad_key = _through_slots(of_features, inputs.key_slots, grad_key, inputs.key_tokens)
    query_tokens = (inputs.query if inputs.query_tokens is None else inputs.query_tokens).view(groups, count, -1)
    key_tokens = (inputs.key if inputs.key_tokens is None else inputs.key_tokens).view(groups, count, -1)
    slot_bias = grad_slot_bias.view(groups, -1, slots).sum(1) if needs[8] or needs[10] else None
    return [
        grad_query.view(shape),
        grad_key.view(shape),
        grad_values.view(*shape[:3], -1),
        grad_query_tokens,
        grad_key_tokens,
        of_slots.sum(-1).view(shape[:3]) if needs[5] else None,
        of_features.sum(-1).view(shape[:3]) if needs[6] else None,
        torch.bmm(of_slots.mT, query_tokens) if needs[7] else None,
        slot_bias,
        torch.bmm(of_features.mT, key_tokens) if needs[9] else None,
        slot_bias,
    ]


def _through_slots(
    of_logits: Tensor, slots: Tensor, grad: Tensor, tokens: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the tokens that the slots' maps are applied to, if they are others, and of those of the window."""
    if tokens is not None:
        return torch.bmm(of_logits, slots).view(tokens.shape), grad
    grad = grad.view(*of_logits.shape[:2], -1)
    return None, grad.baddbmm_(of_logits, slots)
