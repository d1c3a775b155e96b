"""The scan over states of units in plain torch: one block after the other, so that the running state stays in caches.

States of units of keys, `output` `[groups, units, slots, head_dim]` and `lse` `[groups, units, slots]`, are merged for
every block of queries over the units it reads (`BlockReach`). Nothing is ever subtracted, and weights are summed
relative to the largest so far: added up as logs, small ones would vanish beside log-sum-exps of 1e6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attend.torch_kernel import attend_backward, attend_forward
from .inter_block import InterBlock
from .reach import BlockReach


def scan_forward(output: Tensor, lse: Tensor, blocks: int, reach: BlockReach) -> tuple[Tensor, Tensor]:
    """Merged states `[groups, blocks, slots, ...]`; a block that reads nothing gets output 0 and lse `-inf`."""
    groups, _, slots, head_dim = output.shape
    merged, merged_lse = output.new_empty(groups, blocks, slots, head_dim), lse.new_empty(groups, blocks, slots)
    _walk(output, lse, merged, merged_lse, reach, backwards=False)
    if not reach.is_causal:
        _walk(output, lse, merged, merged_lse, reach, backwards=True)
    return merged, merged_lse


def _walk(
    output: Tensor, lse: Tensor, merged: Tensor, merged_lse: Tensor, reach: BlockReach, *, backwards: bool
) -> None:
    """Give every block the units before it, or, walking backwards, merge those after it with what it has."""
    units, blocks = output.shape[1], merged.shape[1]
    mean = torch.zeros_like(output[:, 0], dtype=lse.dtype)
    # The weights so far, relative to the largest.
    total, top = torch.zeros_like(lse[:, 0]), torch.full_like(lse[:, 0], torch.finfo(lse.dtype).min)
    passed = 0
    for number in range(blocks):
        block = blocks - 1 - number if backwards else number
        edge = (units - (block + 1) * reach.units if backwards else block * reach.units) - reach.margin
        for place in range(passed, edge):
            unit = units - 1 - place if backwards else place
            new_top = torch.maximum(top, lse[:, unit])
            new = (lse[:, unit] - new_top).exp_()
            total.mul_(top.sub_(new_top).exp_()).add_(new)
            top = new_top
            mean.lerp_(output[:, unit].to(new.dtype), (new / total.masked_fill(total == 0, 1.0)).unsqueeze(-1))
        passed = max(passed, edge)
        state_lse = total.log().add_(top)
        if not backwards:
            merged[:, block], merged_lse[:, block] = mean, state_lse
            continue
        result, result_lse = merged[:, block], merged_lse[:, block]
        largest = torch.maximum(result_lse, state_lse).clamp_min_(torch.finfo(lse.dtype).min)
        new = (state_lse - largest).exp_()
        whole = (result_lse - largest).exp_().add_(new)
        share = new / whole.masked_fill(whole == 0, 1.0)
        result.lerp_(mean.to(result.dtype), share.unsqueeze(-1).to(result.dtype))
        result_lse.copy_(whole.log_().add_(largest))


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
    _walk_back(grad_output, shift, merged_lse, lse, grads, reach, backwards=True)
    if not reach.is_causal:
        _walk_back(grad_output, shift, merged_lse, lse, grads, reach, backwards=False)
    return grads[0].to(output.dtype), _dot(output, grads[0], lse.dtype) - grads[1]


def _walk_back(
    grad_output: Tensor,
    shift: Tensor,
    merged_lse: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor],
    reach: BlockReach,
    *,
    backwards: bool,
) -> None:
    """Give every unit the sums over the blocks after it that read it, or those before it, walking forwards.

    `exp(-B_i)` may be anything, so the running sums `sum_i exp(low - B_i) dO_i` and the same of the shifts are
    relative to the smallest `B_i` so far, `low`, which is at least `b_k`.
    """
    blocks, units = merged_lse.shape[1], lse.shape[1]
    total, total_shift = torch.zeros_like(grads[0][:, 0]), torch.zeros_like(grads[1][:, 0])
    low, passed = torch.full_like(total_shift, float("inf")), 0
    for place in range(units):
        unit = units - 1 - place if backwards else place
        while passed < blocks:
            block = blocks - 1 - passed if backwards else passed
            before, after = block * reach.units - reach.margin, (block + 1) * reach.units + reach.margin
            if before <= unit if backwards else after > unit:
                break
            new_low = torch.minimum(low, merged_lse[:, block])
            finite = new_low.clamp_max(torch.finfo(low.dtype).max)
            old, new = (finite - low).exp_(), (finite - merged_lse[:, block]).exp_()
            total.mul_(old.unsqueeze(-1)).addcmul_(grad_output[:, block].to(low.dtype), new.unsqueeze(-1))
            total_shift.mul_(old).addcmul_(shift[:, block], new)
            low, passed = new_low, passed + 1
        weight = (lse[:, unit] - low).exp_()
        grads[0][:, unit].addcmul_(total, weight.unsqueeze(-1))
        grads[1][:, unit].addcmul_(total_shift, weight)


def _dot(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Dot products of the last dimension, one block at a time."""
    pairs = zip(left.unbind(1), right.unbind(1), strict=True)
    return torch.stack([(x.to(dtype) * y.to(dtype)).sum(-1) for x, y in pairs], dim=1)


_inter_block = InterBlock(attend_forward, attend_backward, scan_forward, scan_backward)
blocks_forward, blocks_backward = _inter_block.forward, _inter_block.backward
