"""The scan over states of units in plain torch: one block after the other, so that the running state stays in caches.

States of units of keys, `output` `[groups, units, slots, head_dim]` and `lse` `[groups, units, slots]`, are merged for
every block of queries over the units it reads (`BlockReach`). Nothing is ever subtracted, and weights are summed
relative to the largest so far: added up as logs, small ones would vanish beside log-sum-exps of 1e6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..attend.torch_kernel import attend_backward, attend_forward
from ..attention_state import AttentionState, merge_states
from .inter_block import BlockReach, InterBlock


def scan_forward(output: Tensor, lse: Tensor, blocks: int, reach: BlockReach) -> tuple[Tensor, Tensor]:
    """Merged states `[groups, blocks, slots, ...]`; a block that reads nothing gets output 0 and lse `-inf`."""
    groups, num_units, slots, head_dim = output.shape
    merged, merged_lse = output.new_empty(groups, blocks, slots, head_dim), lse.new_empty(groups, blocks, slots)
    units, results = _unbound(output, lse), _unbound(merged, merged_lse)
    stops = [block * reach.units - reach.margin for block in range(blocks)]
    for result, before in zip(results, _prefixes(units, stops), strict=True):
        result.output.copy_(before.output)
        result.lse.copy_(before.lse)
    if not reach.is_causal:
        stops = [num_units - (block + 1) * reach.units - reach.margin for block in reversed(range(blocks))]
        for result, after in zip(reversed(results), _prefixes(units[::-1], stops), strict=True):
            both = merge_states([result, after])
            result.output.copy_(both.output)
            result.lse.copy_(both.lse)
    return merged, merged_lse


def _prefixes(units: Sequence[AttentionState], stops: Sequence[int]) -> Iterator[AttentionState]:
    """The units before each stop, merged; stops rise. What is yielded changes with the next step."""
    mean = torch.zeros_like(units[0].output, dtype=units[0].lse.dtype)
    # The weights so far, relative to the largest.
    total, top = torch.zeros_like(units[0].lse), torch.full_like(units[0].lse, torch.finfo(mean.dtype).min)
    passed = 0
    for stop in stops:
        for unit in units[passed : max(passed, stop)]:
            new_top = torch.maximum(top, unit.lse)
            new = (unit.lse - new_top).exp_()
            total.mul_(top.sub_(new_top).exp_()).add_(new)
            top = new_top
            mean.lerp_(unit.output.to(new.dtype), (new / total.masked_fill(total == 0, 1.0)).unsqueeze(-1))
        passed = max(passed, stop)
        yield AttentionState(mean, total.log().add_(top))


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
