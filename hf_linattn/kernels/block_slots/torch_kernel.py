"""The scan over states of units in plain torch: one block after the other, so that the running state stays in caches.

States of units of keys, `output` `[groups, units, slots, head_dim]` and `lse` `[groups, units, slots]`, are merged for
every block of queries over the units it reads (`BlockReach`). Nothing is ever subtracted, and weights are summed
relative to the largest so far: added up as logs, small ones would vanish beside log-sum-exps of 1e6. Forward, all
weights are known before the first state is touched, so that a state costs one or two operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attend.torch_kernel import attend_backward, attend_forward
from ..attention_state import AttentionState
from .inter_block import BlockReach, InterBlock


class _Masses(NamedTuple):
    """Sums of weights, `exp(top)` times `total`: both `[groups, ..., slots]`."""

    total: Tensor
    top: Tensor

    def at(self, stops: Sequence[int]) -> _Masses:
        """Those of so many units, of the sums up to every unit; 0 units have none."""
        none = torch.zeros_like(self.total[:, :1]), torch.full_like(self.top[:, :1], torch.finfo(self.top.dtype).min)
        return _Masses(*(_at(torch.cat([start, z], 1), stops) for start, z in zip(none, self, strict=True)))

    def with_shares(self, others: _Masses) -> tuple[_Masses, Tensor]:
        """Both together, and the share that the others have in them."""
        top = torch.maximum(self.top, others.top)
        other = (others.top - top).exp_().mul_(others.total)
        total = (self.top - top).exp_().mul_(self.total).add_(other)
        return _Masses(total, top), other.div_(total.masked_fill(total == 0, 1.0))


def scan_forward(output: Tensor, lse: Tensor, blocks: int, reach: BlockReach) -> tuple[Tensor, Tensor]:
    """Merged states `[groups, blocks, slots, ...]`; a block that reads nothing gets output 0 and lse `-inf`."""
    groups, num_units, slots, head_dim = output.shape
    merged = lse.new_empty(groups, blocks, slots, head_dim)
    units, results = output.unbind(1), merged.unbind(1)
    mean, passed = lse.new_zeros(groups, slots, head_dim), 0
    masses, shares = _prefixes(lse)
    stops = [_clipped(block * reach.units - reach.margin, num_units) for block in range(blocks)]
    for result, stop in zip(results, stops, strict=True):
        for unit, share in zip(units[passed:stop], shares[passed:stop], strict=True):
            mean = torch.lerp(mean, unit.to(mean.dtype), share, out=result)
        if mean is not result:
            result.copy_(mean)
        mean, passed = result, max(passed, stop)
    masses = masses.at(stops)
    if not reach.is_causal:
        after, shares = _prefixes(lse.flip(1))
        stops = [_clipped(num_units - (block + 1) * reach.units - reach.margin, num_units) for block in range(blocks)]
        masses, parts = masses.with_shares(after.at(stops))
        mean, passed = lse.new_zeros(groups, slots, head_dim), 0
        backwards = zip(results[::-1], stops[::-1], parts.unsqueeze(-1).unbind(1)[::-1], strict=True)
        for result, stop, part in backwards:
            for unit, share in zip(units[::-1][passed:stop], shares[passed:stop], strict=True):
                mean.lerp_(unit.to(mean.dtype), share)
            result.lerp_(mean, part)
            passed = max(passed, stop)
    return merged.to(output.dtype), masses.total.log_().add_(masses.top)


def _prefixes(lse: Tensor) -> tuple[_Masses, tuple[Tensor, ...]]:
    """Sums over every unit and those before it, and the share `[groups, slots, 1]` that each unit has in its sum."""
    lowest = torch.finfo(lse.dtype).min
    top = lse.cummax(1).values.clamp_min_(lowest)
    before = torch.cat([torch.full_like(top[:, :1], lowest), top[:, :-1]], 1)
    new = (lse - top).exp_()
    total = _recurrence((before - top).exp_(), new)
    shares = new / total.masked_fill(total == 0, 1.0)
    return _Masses(total, top), shares.unsqueeze(-1).unbind(1)


def _recurrence(decay: Tensor, new: Tensor) -> Tensor:
    """`x_n = decay_n x_(n-1) + new_n` along dimension 1, from 0."""
    results = torch.empty_like(new)
    before = torch.zeros_like(new[:, 0]) if new.shape[1] else new
    for result, factor, term in zip(results.unbind(1), decay.unbind(1), new.unbind(1), strict=True):
        before = torch.addcmul(term, before, factor, out=result)
    return results


def _clipped(stop: int, units: int) -> int:
    return min(max(0, stop), units)


def _at(x: Tensor, places: Sequence[int]) -> Tensor:
    """Entries of dimension 1."""
    entries = x.unbind(1)
    return torch.stack([entries[place] for place in places], 1) if places else x[:, :0]


def scan_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    output: Tensor,
    lse: Tensor,
    merged: Tensor,
    merged_lse: Tensor,
    reach: BlockReach,
) -> tuple[Tensor, Tensor]:
    r"""Gradients of `output` and `lse`.

    With weights `w[i, k] = exp(b_k - B_i)` of unit k in the result of block i,

        d u_k = sum_i w[i, k] dO_i                    d b_k = u_k . d u_k - sum_i w[i, k] (dO_i . O_i - dB_i)

    are sums over the blocks i that read k.
    """
    shift = _dot(grad_output, merged, lse.dtype) - grad_lse
    # A block that reads nothing adds nothing, whatever its gradients are.
    merged_lse = merged_lse.masked_fill(merged_lse == float("-inf"), float("inf"))
    grads = torch.zeros(output.shape, dtype=lse.dtype, device=output.device), torch.zeros_like(lse)
    (_, num_units, _), blocks = lse.shape, range(merged_lse.shape[1])
    readers = list(zip(*(z.unbind(1) for z in (grad_output, shift, merged_lse)), strict=True))
    units = list(zip(lse.unbind(1), *(z.unbind(1) for z in grads), strict=True))
    firsts = [num_units - block * reach.units + reach.margin for block in reversed(blocks)]
    _add_readers(units[::-1], readers[::-1], firsts)
    if not reach.is_causal:
        _add_readers(units, readers, [(block + 1) * reach.units + reach.margin for block in blocks])
    return grads[0].to(output.dtype), _dot(output, grads[0], lse.dtype) - grads[1]


def _add_readers(
    units: Sequence[tuple[Tensor, ...]], readers: Sequence[tuple[Tensor, ...]], firsts: Sequence[int]
) -> None:
    """Add the sums over the blocks that read a unit to its gradients.

    `exp(-B_i)` may be anything, so the running sums `sum_i exp(low - B_i) dO_i` and the same of the shifts are
    relative to the smallest `B_i` so far, `low`, which is at least `b_k`.

    Args:
        units: Of each its `b_k` and the two tensors that are added to.
        readers: Of each block `dO_i`, its shift and `B_i`. It reads the units from the number in `firsts` on.
    """
    lse, *grads = units[0]
    total, total_shift = (torch.zeros_like(z) for z in grads)
    low, passed = torch.full_like(lse, float("inf")), 0
    for number, (lse, of_output, of_lse) in enumerate(units):
        while passed < len(readers) and firsts[passed] <= number:
            grad_output, shift, block_lse = readers[passed]
            new_low = torch.minimum(low, block_lse)
            finite = new_low.clamp_max(torch.finfo(low.dtype).max)
            old, new = (finite - low).exp_(), (finite - block_lse).exp_()
            total.mul_(old.unsqueeze(-1)).addcmul_(grad_output.to(low.dtype), new.unsqueeze(-1))
            total_shift.mul_(old).addcmul_(shift, new)
            low, passed = new_low, passed + 1
        weight = (lse - low).exp_()
        of_output.addcmul_(total, weight.unsqueeze(-1))
        of_lse.addcmul_(total_shift, weight)


def _unbound(output: Tensor, lse: Tensor) -> list[AttentionState]:
    """The states of every unit or block, as views."""
    return [AttentionState(*pair) for pair in zip(output.unbind(1), lse.unbind(1), strict=True)]


def _dot(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Dot products of the last dimension, one block at a time."""
    pairs = zip(left.unbind(1), right.unbind(1), strict=True)
    return torch.stack([(x.to(dtype) * y.to(dtype)).sum(-1) for x, y in pairs], dim=1)


_inter_block = InterBlock(attend_forward, attend_backward, scan_forward, scan_backward)
blocks_forward, blocks_backward = _inter_block.forward, _inter_block.backward
