"""One token of generation through slots, in one kernel: a program updates and reads the slots of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import LN_2, LOG2_E
from ..triton_tiles import at, load_tile, store_tile


@triton.jit
def _load_vector(base, SIZE: tl.constexpr, PADDED: tl.constexpr):
    index = tl.arange(0, PADDED)
    return tl.load(base + index, mask=index < SIZE, other=0.0).to(tl.float32)


# fmt: off
@triton.jit(do_not_specialize=["num_slots"])
def step(
    query, query_slots, query_slot_bias, key, key_bias, key_slots, key_slot_bias, value,
    state_output, state_lse, output, lse, new_output, new_lse,
    query_slots_b, query_slots_h, query_slots_m, query_slot_bias_b, query_slot_bias_h, query_slot_bias_m,
    key_slots_b, key_slots_h, key_slots_m, key_slot_bias_b, key_slot_bias_h, key_slot_bias_m,
    num_heads, num_slots,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: on
    """All but the slots and their biases is contiguous. Log-sum-exps are to base 2 inside."""
    group = tl.program_id(0).to(tl.int64)
    batch, head = group // num_heads, group % num_heads
    q, k = _load_vector(query + group * D, D, D_PADDED), _load_vector(key + group * D, D, D_PADDED)
    v = _load_vector(value + group * E, E, E_PADDED)
    k_bias = tl.load(key_bias + group).to(tl.float32)
    query_slots = at(query_slots, batch, head, query_slots_b, query_slots_h)
    query_slot_bias = at(query_slot_bias, batch, head, query_slot_bias_b, query_slot_bias_h)
    key_slots = at(key_slots, batch, head, key_slots_b, key_slots_h)
    key_slot_bias = at(key_slot_bias, batch, head, key_slot_bias_b, key_slot_bias_h)
    first = group * num_slots

    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    read = tl.zeros([E_PADDED], tl.float32)
    for start in range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < num_slots
        products = tl.sum(load_tile(key_slots, start, key_slots_m, num_slots, BLOCK, D, D_PADDED) * k[None, :], 1)
        bias = tl.load(key_slot_bias + slot * key_slot_bias_m, mask=inside, other=float("-inf"))
        gained = (products + k_bias + bias) * LOG2_E
        held = tl.load(state_lse + first + slot, mask=inside, other=float("-inf")) * LOG2_E
        larger = tl.maximum(gained, held)
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        gained, held = tl.exp2(gained - finite), tl.exp2(held - finite)
        both = gained + held
        empty = both == 0.0
        safe = tl.where(empty, 1.0, both)
        slot_lse = tl.where(empty, float("-inf"), finite + tl.log2(safe))
        tl.store(new_lse + first + slot, slot_lse * LN_2, mask=inside)
        tile = load_tile(state_output + first * E, start, E, num_slots, BLOCK, E, E_PADDED)
        tile = tile * (held / safe)[:, None] + v[None, :] * (gained / safe)[:, None]
        store_tile(new_output + first * E, start, E, num_slots, tile, BLOCK, E, E_PADDED)

        products = tl.sum(load_tile(query_slots, start, query_slots_m, num_slots, BLOCK, D, D_PADDED) * q[None, :], 1)
        bias = tl.load(query_slot_bias + slot * query_slot_bias_m, mask=inside, other=float("-inf"))
        logits = (products + bias) * LOG2_E + slot_lse
        new_top = tl.maximum(top, tl.max(logits, 0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, decay = tl.exp2(logits - finite_top), tl.exp2(top - finite_top)
        total = total * decay + tl.sum(weights, 0)
        read = read * decay + tl.sum(weights[:, None] * tile, 0)
        top = new_top

    nothing = total == 0.0
    safe_total = tl.where(nothing, 1.0, total)
    index = tl.arange(0, E_PADDED)
    tl.store(output + group * E + index, (read / safe_total).to(output.dtype.element_ty), mask=index < E)
    tl.store(lse + group, tl.where(nothing, float("-inf"), (top + tl.log2(safe_total)) * LN_2))
