"""`scan` in plain torch: one block after the other, so that the running state stays in the caches of a core.

States of units of keys, `output` `[groups, units, slots, head_dim]` and `lse` `[groups, units, slots]`, are
merged for every block of queries over the units it reads (`BlockReach`). Nothing is ever subtracted, and weights are
summed relative to the largest mass so far: added up as logs, small ones would vanish beside masses of 1e6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reach import BlockReach


def scan_forward(output: Tensor, lse: Tensor, blocks: int, reach: BlockReach) -> tuple[Tensor, Tensor]:
    """Merged states `[groups, blocks, slots, ...]`; a block that reads nothing gets output 0 and mass `-inf`."""
    groups, units, slots, head_dim = output.shape
    merged, mass = output.new_empty(groups, blocks, slots, head_dim), lse.new_empty(groups, blocks, slots)
    state, done = _State(output, lse), 0
    for block in range(blocks):
        for unit in range(done, reach.before(block)):
            state.join(output[:, unit], lse[:, unit])
        done = max(done, reach.before(block))
        merged[:, block], mass[:, block] = state.mean, state.lse()
    if reach.is_causal:
        return merged, mass
    state, done = _State(output, lse), units
    for block in reversed(range(blocks)):
        for unit in reversed(range(reach.after(block, units), done)):
            state.join(output[:, unit], lse[:, unit])
        done = min(done, reach.after(block, units))
        merged[:, block], mass[:, block] = _join(merged[:, block], mass[:, block], state.mean, state.lse())
    return merged, mass


def scan_backward(
    grad_output: Tensor,
    grad_mass: Tensor,
    output: Tensor,
    lse: Tensor,
    merged: Tensor,
    merged_mass: Tensor,
    reach: BlockReach,
) -> tuple[Tensor, Tensor]:
    r"""Gradients of `output` and `lse`.

    With weights `w[i, k] = exp(b_k - B_i)` of unit k in the result of block i,

        d u_k = sum_i w[i, k] dO_i                    d b_k = u_k . d u_k - sum_i w[i, k] (dO_i . O_i - dB_i)

    are sums over the blocks i that read k. `exp(-B_i)` may be anything, so the running sums are kept relative to the
    smallest `B_i` so far, which is at least `b_k`.
    """
    blocks, units = merged.shape[1], output.shape[1]
    shift = _dot(grad_output, merged, lse.dtype) - grad_mass
    grad_states = torch.zeros(output.shape, dtype=lse.dtype, device=output.device)
    grad_shift = torch.zeros_like(lse)
    sums, block = _Sums(output, lse), blocks - 1
    for unit in reversed(range(units)):
        while block >= 0 and reach.before(block) > unit:
            sums.add(grad_output[:, block], shift[:, block], merged_mass[:, block])
            block -= 1
        sums.give(grad_states[:, unit], grad_shift[:, unit], lse[:, unit])
    if not reach.is_causal:
        sums, block = _Sums(output, lse), 0
        for unit in range(units):
            while block < blocks and reach.after(block, units) <= unit:
                sums.add(grad_output[:, block], shift[:, block], merged_mass[:, block])
                block += 1
            sums.give(grad_states[:, unit], grad_shift[:, unit], lse[:, unit])
    return grad_states.to(output.dtype), _dot(output, grad_states, lse.dtype) - grad_shift


class _Sums:
    """`sum_i exp(low - B_i) dO_i` and the same of the shifts; `low` is the smallest `B_i` so far."""

    def __init__(self, output: Tensor, lse: Tensor) -> None:
        self.total, self.shift = torch.zeros_like(output[:, 0], dtype=lse.dtype), torch.zeros_like(lse[:, 0])
        self.low = torch.full_like(self.shift, float("inf"))

    def add(self, grad_output: Tensor, shift: Tensor, mass: Tensor) -> None:
        # A block that reads nothing adds nothing, whatever its gradients are.
        mass = mass.masked_fill(mass == float("-inf"), float("inf"))
        low = torch.minimum(self.low, mass)
        finite = low.clamp_max(torch.finfo(low.dtype).max)
        old, new = (finite - self.low).exp_(), (finite - mass).exp_()
        self.total.mul_(old.unsqueeze(-1)).addcmul_(grad_output.to(low.dtype), new.unsqueeze(-1))
        self.shift.mul_(old).addcmul_(shift, new)
        self.low = low

    def give(self, grad_state: Tensor, grad_shift: Tensor, lse: Tensor) -> None:
        weight = (lse - self.low).exp_()
        grad_state.addcmul_(self.total, weight.unsqueeze(-1))
        grad_shift.addcmul_(self.shift, weight)


def _dot(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Dot products of the last dimension, one block at a time."""
    pairs = zip(left.unbind(1), right.unbind(1), strict=True)
    return torch.stack([(x.to(dtype) * y.to(dtype)).sum(-1) for x, y in pairs], dim=1)


class _State:
    """The mean of states so far, and their weights `total`, relative to the largest, `exp(top)`."""

    def __init__(self, output: Tensor, lse: Tensor) -> None:
        self.mean = torch.zeros_like(output[:, 0], dtype=lse.dtype)
        self.total = torch.zeros_like(lse[:, 0])
        self.top = torch.full_like(self.total, torch.finfo(lse.dtype).min)

    def join(self, output: Tensor, lse: Tensor) -> None:
        top = torch.maximum(self.top, lse)
        new = (lse - top).exp_()
        self.total.mul_(self.top.sub_(top).exp_()).add_(new)
        self.top = top
        self.mean.lerp_(output.to(new.dtype), (new / self.total.masked_fill(self.total == 0, 1.0)).unsqueeze(-1))

    def lse(self) -> Tensor:
        return self.total.log().add_(self.top)


def _join(state: Tensor, mass: Tensor, other: Tensor, other_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two states; `state` is overwritten."""
    top = torch.maximum(mass, other_mass).clamp_min_(torch.finfo(mass.dtype).min)
    own, new = (mass - top).exp_(), (other_mass - top).exp_()
    total = own + new
    share = new / total.masked_fill(total == 0, 1.0)
    return state.lerp_(other.to(state.dtype), share.unsqueeze(-1).to(state.dtype)), total.log_().add_(top)
