r"""What queries of a tile read from their windows and, through slots, from all others.

Query t of window i has the logits `x_t . y_n` of the keys of its window and, for each slot j, `a[t, j] + b[i, j]`
with the log-mass `b` of the keys outside of the window. With a reference `r_j` these are sums over the other windows
k,

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

from .inputs import ShortInputs, ShortOptions, Tile
from .probes import mass_shift
from .workspace import OWN, SMALL, Workspace, workspace

# The least mass of the other windows, relative to the largest weight of all: e^-28 of it, below the rounding of
# float32, is still above the smallest number.
_LEAST_MASS = math.exp(-59)
# Of windows whose sums are a product with a square of them.
_MOST_WINDOWS = 256
# Logits of float32 up to this size are rounded by 3e-5 at most.
_LARGEST = 512.0


class References(NamedTuple):
    """References of slots, and how sums of windows that are relative to them are summed over the others of each.

    own: `[all rows, windows or 1, slots]`, of what a window holds; `all rows` are those of all groups.
    others: The same, of what a window reads.
    merge: `[all rows, windows, n]` (`[.., slots, n]` flattened) -> the same, for every window the sum of the others,
        times the exponential of the queries' shift; into memory of as many numbers, if given.
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
    slot_values: `U`, `[n, slots, head_dim]`. mass: `Z`, `[n, slots]`, 1 for none. values: `[n, places, head_dim]`.
    spread: `[groups, tokens, slots]`, how a key spreads its unit of weight, as logarithms; `None` without that.
    """

    tile: Tile
    references: References
    weights: Tensor
    logits: Tensor
    features: Tensor
    slot_values: Tensor
    mass: Tensor
    values: Tensor
    spread: Tensor | None
    memory: Workspace

    def output(self) -> Tensor:
        """`[n, places, head_dim]`."""
        places = self.tile.options.places
        output = torch.bmm(self.weights[..., :places], self.values, out=self.memory.output)
        return output.baddbmm_(self.weights[..., places:], self.slot_values)

    def lse(self) -> Tensor:
        """`[n, places]`: the largest logit minus the log of its weight."""
        largest = self.logits.amax(-1)
        lse = largest - self.weights.amax(-1).log_()
        return lse.masked_fill_(largest == float("-inf"), float("-inf"))


def read_tile(tile: Tile) -> Read:
    inputs = tile.inputs
    dtype = inputs.query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if dtype != wide or inputs.value.dtype != wide:
        tile = tile._replace(inputs=_converted(inputs, wide))
    read = _attempt(tile, _row_references) if tile.windows <= _MOST_WINDOWS else None
    if read is None:
        tile = tile._replace(inputs=_converted(inputs, torch.float64))
        read = _attempt(tile, _own_references)
        assert read is not None
    return read


def _converted(inputs: ShortInputs, dtype: torch.dtype) -> ShortInputs:
    return ShortInputs(*(None if z is None else z.to(dtype) for z in inputs))  # type: ignore[arg-type]


def _attempt(tile: Tile, references_of: Callable[[Tensor, Tile], References]) -> Read | None:
    """`None` where references of the row leave too few digits."""
    inputs, options, windows = tile.inputs, tile.options, tile.windows
    places, root, has_hidden = options.places, options.root, options.has_hidden
    (groups, tokens, _), slots = inputs.query.shape, inputs.query_slots.shape[1]
    all_rows, number = groups * tile.rows, groups * tokens // places
    values = inputs.value.view(number, places, -1)
    memory = OWN
    if groups * tokens * (places + slots) >= SMALL:
        memory = workspace(groups, tokens, number, slots, values.shape[-1], values.dtype)

    log_features, spread = _key_logits(inputs, options, memory.features)
    references = references_of(log_features.view(all_rows, -1, slots), tile)
    by_window = log_features.view(all_rows, windows, places, slots)
    features = by_window.sub_(references.own.unsqueeze(2)).exp_().view(number, places, slots)
    sums = torch.bmm(features.mT, values, out=memory.sums)
    held = features.sum(1).view(all_rows, windows, slots)
    mass = references.merge(held)

    query_tokens = inputs.query if inputs.query_tokens is None else inputs.query_tokens
    bias, norm = inputs.query_bias, options.query_norm * root**2
    of_slots, query_bias = _logits(query_tokens, inputs.query_slots, bias, norm, root, memory.of_slots)
    if references_of is _row_references and not _is_safe(mass, references.own, query_bias, tile):
        return None
    log_mass = mass.log().add_(references.others)
    slot_bias = inputs.query_slot_bias
    if inputs.key_slot_bias is not None and not options.spreads:
        slot_bias = inputs.key_slot_bias if slot_bias is None else slot_bias + inputs.key_slot_bias
    if slot_bias is not None:
        log_mass.view(groups, -1, slots).add_(slot_bias.unsqueeze(1))
    if options.probes:
        log_mass.add_(mass_shift(tile, of_slots, held, references.own))
    if has_hidden:
        mass.masked_fill_(mass == 0, 1.0)
    mass = mass.view(number, slots)
    slot_values = references.merge(sums.view(all_rows, windows, -1), memory.others)
    slot_values = slot_values.view(sums.shape).div_(mass.unsqueeze(-1))

    query, key = inputs.query.view(number, places, -1), inputs.key.view(number, places, -1)
    in_window = torch.bmm(query, key.mT, out=memory.in_window)
    logits = values.new_empty(number, places, places + slots) if memory.logits is None else memory.logits
    torch.mul(in_window, root**2, out=logits[..., :places])
    torch.add(of_slots.view(number, places, slots), log_mass.view(number, 1, slots), out=logits[..., places:])
    if has_hidden:
        assert inputs.key_bias is not None
        hidden = (inputs.key_bias == float("-inf")).view(number, 1, places)
        logits[..., :places].masked_fill_(hidden, float("-inf"))
    weights = torch.softmax(logits, -1, out=memory.weights)
    if has_hidden:  # perhaps nothing to see
        weights.masked_fill_(logits.amax(-1, keepdim=True) == float("-inf"), 0.0)
    return Read(tile, references, weights, logits, features, slot_values, mass, values, spread, memory)


def _key_logits(inputs: ShortInputs, options: ShortOptions, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Log-weights of keys `[groups, tokens, slots]`, and how they spread their weight."""
    tokens, slots = inputs.key if inputs.key_tokens is None else inputs.key_tokens, inputs.key_slots
    norm = options.key_norm * options.root**2
    if not options.spreads:
        return _logits(tokens, slots, inputs.key_bias, norm, options.root, memory)[0], None
    products, _ = _logits(tokens, slots, None, 0.0, options.root, memory)
    if inputs.key_slot_bias is not None:
        products.add_(inputs.key_slot_bias.unsqueeze(1))
    spread, bias = torch.log_softmax(products, -1), _token_bias(tokens, inputs.key_bias, norm)
    return spread.clone() if bias is None else torch.add(spread, bias, out=memory), spread


def _token_bias(tokens: Tensor, bias: Tensor | None, norm: float) -> Tensor | None:
    """`bias - norm |tokens|^2 / 2`, `[groups, tokens, 1]`; `None` for 0."""
    if norm:
        half = torch.linalg.vecdot(tokens, tokens).mul_(-norm / 2)
        bias = half if bias is None else half.add_(bias)
    return None if bias is None else bias.unsqueeze(-1)


def _logits(
    tokens: Tensor, slots: Tensor, bias: Tensor | None, norm: float, root: float, memory: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`root tokens . slots + bias - norm |tokens|^2 / 2`, `[groups, tokens, slots]`, and its part without slots."""
    if bias is not None or norm:
        of_tokens = _token_bias(tokens, bias, norm)
        assert of_tokens is not None
        return torch.baddbmm(of_tokens, tokens, slots.mT, alpha=root, out=memory), of_tokens
    products = torch.bmm(tokens, slots.mT, out=memory)
    return products if root == 1 else products.mul_(root), None


def _is_safe(mass: Tensor, reference: Tensor, query_bias: Tensor | None, tile: Tile) -> bool:
    """Whether no sum has lost what counts, and no logit is large."""
    for logits in (reference, query_bias):
        if logits is None:
            continue
        least, most = torch.aminmax(logits)
        if not (-_LARGEST <= float(least) and float(most) <= _LARGEST):
            return False
    least_mass = _LEAST_MASS * math.exp(tile.options.shift)
    if float(mass.amin()) >= least_mass:
        return True
    if not tile.options.has_hidden:
        return False
    assert tile.inputs.key_bias is not None
    is_real = (tile.inputs.key_bias > float("-inf")).view(*mass.shape[:2], -1).any(-1, keepdim=True)
    has_others = _others(tile.windows, 1.0, mass.dtype) @ is_real.to(mass.dtype) > 0
    return not bool(((mass < least_mass) & has_others).any())


@functools.lru_cache(maxsize=128)
def _others(windows: int, factor: float, dtype: torch.dtype) -> Tensor:
    """`[windows, windows]`, `factor` for another window."""
    return factor * (1 - torch.eye(windows, dtype=dtype, device="cpu"))


def _row_references(log_features: Tensor, tile: Tile) -> References:
    """The largest of a row. log_features: `[all rows, tokens, slots]`."""
    windows = tile.windows
    largest = log_features.amax(1, keepdim=True)
    if tile.options.has_hidden:
        largest.masked_fill_(largest == float("-inf"), 0.0)
    others = _others(windows, math.exp(tile.options.shift), largest.dtype).expand(largest.shape[0], windows, windows)

    def merge(sums: Tensor, memory: Tensor | None = None) -> Tensor:
        return torch.bmm(others, sums, out=None if memory is None else memory.view(sums.shape))

    return References(largest, largest, merge, merge)


def _own_references(log_features: Tensor, tile: Tile) -> References:
    """The largest of every window, and the largest of all the others."""
    all_rows, _, slots = log_features.shape
    lowest = torch.finfo(log_features.dtype).min
    own = log_features.view(all_rows, tile.windows, -1, slots).amax(2).clamp_min_(lowest)
    none = own.new_full((all_rows, 1, slots), lowest)
    before = torch.cat([none, own[:, :-1].cummax(1).values], 1)
    behind = torch.cat([own[:, 1:].flip(1).cummax(1).values.flip(1), none], 1)
    others, shift = torch.maximum(before, behind), tile.options.shift

    def merge(sums: Tensor, memory: Tensor | None = None) -> Tensor:
        return _sums_of_others(sums, own, others - shift)

    return References(own, others, merge, lambda grads: _sums_of_others(grads, shift - others, -own))


def _sums_of_others(sums: Tensor, of: Tensor, to: Tensor) -> Tensor:
    """For every window the sum of the others, `sum_{k != i} exp(of_k - to_i) sums_k`: a scan in either direction.

    Args:
        sums: `[all rows, windows, slots * n]`. of, to: `[all rows, windows, slots]`, `of_k <= to_i` but for the shift.
    """
    windows, slots = of.shape[1:]
    sums = sums.unflatten(2, (slots, -1))
    result = torch.zeros_like(sums)
    of, to = of.unsqueeze(-1), to.unsqueeze(-1)
    for order in (range(windows), range(windows - 1, -1, -1)):
        total, top = torch.zeros_like(sums[:, 0]), torch.full_like(of[:, 0], torch.finfo(of.dtype).min)
        for i in order:
            result[:, i].addcmul_(total, (top - to[:, i]).exp_())
            above = torch.maximum(top, of[:, i])
            total = total * (top - above).exp_() + sums[:, i] * (of[:, i] - above).exp_()
            top = above
    return result.flatten(2)
