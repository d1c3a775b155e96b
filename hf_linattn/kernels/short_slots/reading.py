r"""What queries of a tile read from their windows and, through slots, from all others.

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
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import ShortInputs, Tile
from .workspace import OWN, SMALL, Workspace, workspace

# The least mass of the other windows, relative to the largest weight of all: e^-28 of it, below the rounding of
# float32, is still above the smallest number.
_LEAST_MASS = math.exp(-59)
# Logits of float32 up to this size are rounded by 3e-5 at most.
_LARGEST = 512.0


class References(NamedTuple):
    """References of slots, and how sums of windows that are relative to them are summed over the others of each.

    own: `[groups, rows, windows or 1, slots]`, of what a window holds.
    others: The same, of what a window reads.
    merge: `[groups * rows, windows, slots, n]` -> the same, for every window the sum of the others; into memory of as
        many numbers, if given.
    merge_back: Its transpose.
    """

    own: Tensor
    others: Tensor
    merge: Callable[..., Tensor]
    merge_back: Callable[[Tensor], Tensor]


class Read(NamedTuple):
    """What the queries of a tile read; `n` counts windows of all its groups and rows.

    weights: `[n, places, places + slots]`, of the keys of the window and of the slots; each query's add up to one.
    logits: Of which they are the softmax.
    features: `[n, places, slots]`, weights of keys relative to the references.
    slot_values: `U`, `[n, slots, head_dim]`. mass: `Z`, `[n, slots, 1]`, 1 for none. values: `[n, places, head_dim]`.
    """

    tile: Tile
    references: References
    weights: Tensor
    logits: Tensor
    features: Tensor
    slot_values: Tensor
    mass: Tensor
    values: Tensor
    memory: Workspace

    def output(self) -> Tensor:
        """`[groups, rows, tokens, head_dim]`."""
        places = self.tile.places
        output = torch.bmm(self.weights[..., :places], self.values, out=self.memory.output)
        output.baddbmm_(self.weights[..., places:], self.slot_values)
        return output.view(*self.tile.inputs.query.shape[:3], -1)

    def lse(self) -> Tensor:
        """`[groups, rows, tokens]`: the largest logit minus the log of its weight."""
        largest = self.logits.amax(-1)
        lse = largest - self.weights.amax(-1).log_()
        lse.masked_fill_(largest == float("-inf"), float("-inf"))
        return lse.view(self.tile.inputs.query.shape[:3])


def read_tile(tile: Tile, has_hidden: bool) -> Read:
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


def _attempt(tile: Tile, has_hidden: bool, references_of: Callable[[Tensor, Tile, bool], References]) -> Read | None:
    """`None` where references of the row leave too few digits."""
    inputs, places, windows = tile.inputs, tile.places, tile.windows
    groups, rows, tokens, dim = inputs.query.shape
    slots, number = inputs.query_slots.shape[1], groups * rows * windows
    values = inputs.value.view(number, places, -1)
    memory = OWN
    if groups * rows * tokens * (places + slots) >= SMALL:
        memory = workspace(groups, rows * tokens, number, slots, values.shape[-1], values.dtype)
    key_tokens = inputs.key if inputs.key_tokens is None else inputs.key_tokens
    log_features = _logits(key_tokens, inputs.key_slots, inputs.key_bias, memory.features)
    references = references_of(log_features, tile, has_hidden)
    by_window = log_features.view(groups, rows, windows, places, slots)
    features = by_window.sub_(references.own.unsqueeze(3)).exp_().view(number, places, slots)

    sums = torch.bmm(features.mT, values, out=memory.sums)
    sums = sums.view(groups * rows, windows, slots, -1)
    mass = references.merge(features.sum(1).view(groups * rows, windows, slots, 1), None)
    is_rough = references_of is _row_references
    if is_rough and not _is_safe(mass, references.own, tile, has_hidden=has_hidden):
        return None
    log_mass = mass.log().view(groups, rows, windows, 1, slots)
    if has_hidden:
        mass.masked_fill_(mass == 0, 1.0)
    mass = mass.view(number, slots, 1)
    slot_values = references.merge(sums, memory.others).view(number, slots, -1).div_(mass)

    slot_bias = (inputs.query_slot_bias + inputs.key_slot_bias).view(groups, 1, 1, 1, slots)
    query_tokens = inputs.query if inputs.query_tokens is None else inputs.query_tokens
    of_slots = _logits(query_tokens, inputs.query_slots, inputs.query_bias, memory.of_slots)
    of_slots = of_slots.view(groups, rows, windows, places, slots)
    of_slots += log_mass + (references.others.unsqueeze(3) + slot_bias)
    query, key = inputs.query.view(number, places, dim), inputs.key.view(number, places, dim)
    in_window = torch.bmm(query, key.mT, out=memory.in_window)
    if has_hidden:
        in_window.masked_fill_((inputs.key_bias == float("-inf")).view(number, 1, places), float("-inf"))
    logits = torch.cat([in_window, of_slots.view(number, places, slots)], -1, out=memory.logits)
    weights = torch.softmax(logits, -1, out=memory.weights)
    if has_hidden:  # perhaps nothing to see
        weights.masked_fill_(logits.amax(-1, keepdim=True) == float("-inf"), 0.0)
    return Read(tile, references, weights, logits, features, slot_values, mass, values, memory)


def _logits(tokens: Tensor, slots: Tensor, bias: Tensor, memory: Tensor | None) -> Tensor:
    """`tokens . slots + bias`, `[groups, rows, tokens, slots]`."""
    groups, rows, count, dim = tokens.shape
    bias, tokens = bias.view(groups, rows * count, 1), tokens.view(groups, rows * count, dim)
    return torch.baddbmm(bias, tokens, slots.mT, out=memory).view(groups, rows, count, -1)


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
    return 1 - torch.eye(windows, dtype=dtype, device="cpu")


def _row_references(log_features: Tensor, tile: Tile, has_hidden: bool) -> References:
    """The largest of a row."""
    windows = tile.windows
    largest = log_features.amax(2, keepdim=True)
    if has_hidden:
        largest.masked_fill_(largest == float("-inf"), 0.0)
    others = _others(windows, largest.dtype)

    def merge(sums: Tensor, memory: Tensor | None = None) -> Tensor:
        flat = sums.flatten(2)
        merged = torch.bmm(
            others.expand(sums.shape[0], windows, windows),
            flat,
            out=None if memory is None else memory.view(flat.shape),
        )
        return merged.view(sums.shape)

    return References(largest, largest, merge, merge)


def _own_references(log_features: Tensor, tile: Tile, has_hidden: bool) -> References:
    """The largest of every window, and the largest of all the others."""
    groups, rows, _, slots = log_features.shape
    windows, lowest = tile.windows, torch.finfo(log_features.dtype).min
    own = log_features.view(groups, rows, windows, tile.places, slots).amax(3).clamp_min_(lowest)
    is_other = _others(windows, own.dtype).bool()[..., None]
    others = own.unsqueeze(2).masked_fill(~is_other, lowest).amax(3)  # [groups, rows, windows, slots]
    shares = (own.unsqueeze(2) - others.unsqueeze(3)).exp().masked_fill(~is_other, 0.0).flatten(0, 1)

    def merge(sums: Tensor, memory: Tensor | None = None) -> Tensor:
        return torch.einsum("gikm,gkmd->gimd", shares, sums).contiguous()

    def merge_back(grads: Tensor) -> Tensor:
        return torch.einsum("gikm,gimd->gkmd", shares, grads).contiguous()

    return References(own, others, merge, merge_back)
