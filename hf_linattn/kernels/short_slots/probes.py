"""How much more or less mass the slots have than the keys themselves, as some queries find it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..attention_state import consumed_logsumexp
from .inputs import Tile


def mass_shift(tile: Tile, of_slots: Tensor, held: Tensor, reference: Tensor) -> Tensor:
    """Mean over probes of (exact log-sum-exp over the keys of the row - that through slots), `[all rows, 1, 1]`.

    Args:
        of_slots: `[groups, tokens, slots]`, what queries add to the log-mass of a slot, without the slots' biases.
        held: `[all rows, windows, slots]`, what the slots hold of every window, relative to `reference` (`[all rows,
            windows or 1, slots]`). The tile's keys are all real, but for those that fill the last window.
    """
    inputs, (groups, _, dim), slots = tile.inputs, tile.inputs.query.shape, of_slots.shape[-1]
    all_rows, count = groups * tile.rows, tile.cut.tokens
    index = _index(tile.options.probes)
    if reference.shape[1] == 1:
        log_mass = held.sum(1, keepdim=True).log_().add_(reference)
    else:
        log_mass = (held.log() + reference).logsumexp(1, keepdim=True)
    if inputs.query_slot_bias is not None:
        log_mass.view(groups, -1, slots).add_(inputs.query_slot_bias.unsqueeze(1))
    found = of_slots.view(all_rows, -1, slots).index_select(1, index).add_(log_mass)
    probes = inputs.query.view(all_rows, -1, dim).index_select(1, index)
    keys = inputs.key.view(all_rows, -1, dim)[:, :count]
    exact = torch.bmm(probes.mul_(tile.options.root**2), keys.mT)
    difference = consumed_logsumexp(exact) - consumed_logsumexp(found)
    return difference.mean(-1).sub_(tile.options.shift).view(-1, 1, 1)


@functools.lru_cache(maxsize=128)
def _index(probes: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(probes, device="cpu")
