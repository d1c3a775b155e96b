r"""States of units of keys merged for the blocks of queries that read them, in Triton.

A state is a mean `u` and the log `b` of its weight. Block i gets `O_i = sum_k w_ik u_k` over the units k it reads,
with `w_ik = exp(b_k - B_i)` and `B_i = logsumexp_k b_k`. A program owns a few slots and walks over the units, with a
running sum relative to the largest `b_k` so far: nothing overflows, and rounding does not pile up in the logs. Units
before and after a block are one walk in each direction; nothing is ever subtracted.

The derivatives are sums over the readers of a unit, in the same form:

    du_k = sum_i w_ik dO_i,    db_k = sum_i w_ik (dO_i . (u_k - O_i) + dB_i)

Here `exp(-B_i)` is what varies with i, so the running sum is relative to the smallest `B_i` so far; `b_k` is at most
that, since every one of those readers sees k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import narrow


@triton.jit
def _joined(total, top, mean, own_lse, entry):
    """The sum `mean` (weights `total`, relative to `exp(top)`) and one more entry of weight `exp(own_lse)`."""
    new_top = tl.maximum(top, own_lse)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    old, new = tl.exp(top - base), tl.exp(own_lse - base)
    entry = tl.where((new > 0.0)[:, None], entry, 0.0)  # what an empty state holds does not matter
    return total * old + new, new_top, mean * old[:, None] + entry * new[:, None]


@triton.jit
def _reader(edge, units, margin, blocks, AFTER: tl.constexpr):
    """The block that reads exactly the units before (or, with AFTER, from) number `edge`, and whether there is one."""
    if AFTER:
        block = (edge - margin) // units - 1
        return block, ((edge - margin) % units == 0) & (block >= 0) & (edge >= margin) & (block < blocks)
    block = (edge + margin) // units
    return block, ((edge + margin) % units == 0) & (block < blocks)


@triton.jit
def scan_forward(
    output, lse, merged, merged_lse, num_units, blocks, slots, dim, units, margin, steps,
    AFTER: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The merge of all units before each block; with AFTER, those after it are joined to what `merged` holds."""
    tiles = tl.cdiv(slots, TILE)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    slot = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, DIM)
    in_dim = (column < dim)[None, :]

    total = tl.zeros([TILE], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    mean = tl.zeros([TILE, DIM], tl.float32)
    for step in tl.range(0, steps, num_stages=3):
        edge = num_units - step if AFTER else step
        block, exists = _reader(edge, units, margin, blocks, AFTER)
        write = slot < tl.where(exists, slots, 0)
        at_lse = (group * blocks + block) * slots + slot
        at = at_lse[:, None] * dim + column[None, :]
        now_total, now_top, now = total, top, mean
        if AFTER:
            # The other side's mean has the weight exp(own_lse): one more entry.
            other = tl.load(merged + at, mask=write[:, None] & in_dim, other=0.0).to(tl.float32)
            other_lse = tl.load(merged_lse + at_lse, mask=write, other=float("-inf"))
            now_total, now_top, now = _joined(total, top, mean, other_lse, other)
        whole = tl.where(now_total == 0.0, 1.0, now_total)
        tl.store(merged + at, narrow(now / whole[:, None], merged.dtype.element_ty), mask=write[:, None] & in_dim)
        tl.store(merged_lse + at_lse, now_top + tl.log(whole), mask=write)

        unit = edge - 1 if AFTER else edge
        read = slot < tl.where(unit < num_units, slots, 0)
        at_lse = (group * num_units + unit) * slots + slot
        at = at_lse[:, None] * dim + column[None, :]
        entry = tl.load(output + at, mask=read[:, None] & in_dim, other=0.0).to(tl.float32)
        own_lse = tl.load(lse + at_lse, mask=read, other=float("-inf"))
        total, top, mean = _joined(total, top, mean, own_lse, entry)


@triton.jit
def scan_backward(
    grad_merged, grad_merged_lse, merged, merged_lse, output, lse, grad_output, grad_lse, num_units, blocks,
    slots, dim, units, margin, steps,
    AFTER: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Sums over the blocks that read each unit as one before them; with AFTER, the others are added to those."""
    tiles = tl.cdiv(slots, TILE)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    slot = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, DIM)
    in_dim = (column < dim)[None, :]

    lowest = tl.full([TILE], float("inf"), tl.float32)
    summed = tl.zeros([TILE, DIM], tl.float32)  # of exp(lowest - B_i) dO_i
    shifts = tl.zeros([TILE], tl.float32)  # of exp(lowest - B_i) (dB_i - dO_i . O_i)
    for step in tl.range(0, steps, num_stages=2):
        unit = step if AFTER else steps - 1 - step
        block, exists = _reader(unit if AFTER else unit + 1, units, margin, blocks, AFTER)
        read = slot < tl.where(exists, slots, 0)
        at_lse = (group * blocks + block) * slots + slot
        at = at_lse[:, None] * dim + column[None, :]
        own_lse = tl.load(merged_lse + at_lse, mask=read, other=float("-inf"))
        seen = own_lse > float("-inf")  # a block that read nothing passes nothing on
        grad = tl.load(grad_merged + at, mask=read[:, None] & in_dim, other=0.0).to(tl.float32)
        grad = tl.where(seen[:, None], grad, 0.0)
        result = tl.load(merged + at, mask=read[:, None] & in_dim, other=0.0).to(tl.float32)
        shift = tl.load(grad_merged_lse + at_lse, mask=read, other=0.0)
        shift = tl.where(seen, shift, 0.0) - tl.sum(grad * result, 1)
        own_lse = tl.where(seen, own_lse, float("inf"))
        base = tl.minimum(lowest, own_lse)
        finite = tl.where(base == float("inf"), 0.0, base)
        old, new = tl.exp(finite - lowest), tl.exp(finite - own_lse)
        summed = summed * old[:, None] + grad * new[:, None]
        shifts = shifts * old + shift * new
        lowest = base

        write = slot < tl.where(unit < num_units, slots, 0)
        at_lse = (group * num_units + unit) * slots + slot
        at = at_lse[:, None] * dim + column[None, :]
        own_lse = tl.load(lse + at_lse, mask=write, other=float("-inf"))
        entry = tl.load(output + at, mask=write[:, None] & in_dim, other=0.0).to(tl.float32)
        weight = tl.where(lowest < float("inf"), tl.exp(tl.minimum(own_lse - finite, 0.0)), 0.0)
        entry = tl.where((weight > 0.0)[:, None], entry, 0.0)
        found = summed * weight[:, None]
        found_lse = tl.sum(found * entry, 1) + shifts * weight
        if AFTER:
            found += tl.load(grad_output + at, mask=write[:, None] & in_dim, other=0.0)
            found_lse += tl.load(grad_lse + at_lse, mask=write, other=0.0)
        tl.store(grad_output + at, found, mask=write[:, None] & in_dim)
        tl.store(grad_lse + at_lse, found_lse, mask=write)
