"""The forward kernels of `attend`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import LN_2, LOG2_E
from ..triton_tiles import at, dot, key_bias, load_tile, pair_mask, store_tile


# fmt: off
@triton.jit(do_not_specialize=["num_queries", "num_keys", "part_size"])
def forward(
    query, key, value, bias, visible, output, lse,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    bias_b, bias_h, bias_n, visible_b, visible_h, visible_q, visible_k,
    num_heads, num_queries, num_keys, num_parts, part_size,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr, LOGIT_TYPE: tl.constexpr,
):  # fmt: on
    """One block of queries over one part of the keys. Results are `[groups, parts, queries, ...]`, contiguous."""
    blocks = tl.cdiv(num_queries, BLOCK_Q)
    result = tl.program_id(0) // blocks  # group * num_parts + part
    group, part = result // num_parts, result % num_parts
    batch, head = group // num_heads, group % num_heads
    first_q = (tl.program_id(0) % blocks) * BLOCK_Q
    key, value = at(key, batch, head, key_b, key_h), at(value, batch, head, value_b, value_h)
    if bias is not None:
        bias = at(bias, batch, head, bias_b, bias_h)
    if MASK != 0:
        visible = at(visible, batch, head, visible_b, visible_h)
    query = at(query, batch, head, query_b, query_h)
    q = load_tile(query, first_q, query_n, num_queries, BLOCK_Q, D, D_PADDED).to(LOGIT_TYPE)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result_sum = tl.zeros([BLOCK_Q, E_PADDED], tl.float32)
    first_k = part * part_size
    for start in range(first_k, tl.minimum(first_k + part_size, num_keys), BLOCK_K):
        k = load_tile(key, start, key_n, num_keys, BLOCK_K, D, D_PADDED).to(LOGIT_TYPE)
        shift = key_bias(bias, visible, start, bias_n, visible_k, num_keys, MASK, BLOCK_K)
        logits = dot(q, tl.trans(k)) * LOG2_E + shift[None, :]
        if MASK == 2:
            seen = pair_mask(visible, first_q, start, visible_q, visible_k, num_queries, num_keys, BLOCK_Q, BLOCK_K)
            logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing visible so far: weights of 0, not NaN
        weights = tl.exp2(logits - finite[:, None])
        decay = tl.exp2(top - finite)
        total = total * decay + tl.sum(weights, 1)
        v = load_tile(value, start, value_n, num_keys, BLOCK_K, E, E_PADDED)
        result_sum = dot(weights.to(v.dtype), v, result_sum * decay[:, None])
        top = new_top

    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    first = result.to(tl.int64) * num_queries
    store_tile(output + first * E, first_q, E, num_queries, result_sum / safe[:, None], BLOCK_Q, E, E_PADDED)
    queries = first_q + tl.arange(0, BLOCK_Q)
    mass = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * LN_2)
    tl.store(lse + first + queries, mass, mask=queries < num_queries)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def merge(
    part_output, part_mass, output, lse, num_rows, num_parts,
    E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):
    """The softmax over the union of the parts: `[groups, parts, rows, E]` to `[groups, rows, E]`."""
    blocks = tl.cdiv(num_rows, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    row = first + tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK, E_PADDED], tl.float32)
    for part in range(num_parts):
        offset = (group * num_parts + part) * num_rows
        mass = tl.load(part_mass + offset + row, mask=row < num_rows, other=float("-inf")) * LOG2_E
        new_top = tl.maximum(top, mass)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, decay = tl.exp2(mass - finite), tl.exp2(top - finite)
        total = total * decay + weight
        tile = load_tile(part_output + offset * E, first, E, num_rows, BLOCK, E, E_PADDED)
        mean = mean * decay[:, None] + tile * weight[:, None]
        top = new_top
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    store_tile(output + group * num_rows * E, first, E, num_rows, mean / safe[:, None], BLOCK, E, E_PADDED)
    merged = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * LN_2)
    tl.store(lse + group * num_rows + row, merged, mask=row < num_rows)
