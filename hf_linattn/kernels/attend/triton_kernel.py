"""The kernels of `attend`. Backward: weights are recomputed from the log-sum-exp, at most 1 whatever is rounded.

dlogit[t, n] = weight[t, n] (grad_output_t . value_n - delta_t),     delta_t = grad_output_t . output_t - grad_lse_t
"""

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
    row_lse = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * LN_2)
    tl.store(lse + first + queries, row_lse, mask=queries < num_queries)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def merge(
    part_output, part_lse, output, lse, num_rows, num_parts,
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
        row_lse = tl.load(part_lse + offset + row, mask=row < num_rows, other=float("-inf")) * LOG2_E
        new_top = tl.maximum(top, row_lse)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, decay = tl.exp2(row_lse - finite), tl.exp2(top - finite)
        total = total * decay + weight
        tile = load_tile(part_output + offset * E, first, E, num_rows, BLOCK, E, E_PADDED)
        mean = mean * decay[:, None] + tile * weight[:, None]
        top = new_top
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    store_tile(output + group * num_rows * E, first, E, num_rows, mean / safe[:, None], BLOCK, E, E_PADDED)
    merged = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * LN_2)
    tl.store(lse + group * num_rows + row, merged, mask=row < num_rows)


# -- backward --------------------------------------------------------------------------------------------------------


# fmt: off
@triton.jit(do_not_specialize=["num_queries"])
def row_sums(
    grad_output, output, grad_lse, lse, delta, lift,
    grad_b, grad_h, grad_n, output_b, output_h, output_n, lse_b, lse_h, lse_n,
    num_heads, num_queries,
    E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: on
    """What the gradients need of every query: `delta = grad_output . output - grad_lse`, and `lift`, the log-sum-exp
    to base 2, `+inf` where nothing was visible, so that all weights come out as 0."""
    blocks = tl.cdiv(num_queries, BLOCK)
    group = tl.program_id(0) // blocks
    batch, head = group // num_heads, group % num_heads
    first = (tl.program_id(0) % blocks) * BLOCK
    row = first + tl.arange(0, BLOCK)
    inside = row < num_queries
    left = load_tile(at(grad_output, batch, head, grad_b, grad_h), first, grad_n, num_queries, BLOCK, E, E_PADDED)
    right = load_tile(at(output, batch, head, output_b, output_h), first, output_n, num_queries, BLOCK, E, E_PADDED)
    sums = tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    if grad_lse is not None:
        address = at(grad_lse, batch, head, lse_b, lse_h) + row.to(tl.int64) * lse_n
        sums -= tl.load(address, mask=inside, other=0.0)
    offset = group.to(tl.int64) * num_queries
    row_lse = tl.load(lse + offset + row, mask=inside, other=float("-inf"))
    empty = row_lse == float("-inf")
    tl.store(delta + offset + row, tl.where(empty, 0.0, sums), mask=inside)
    tl.store(lift + offset + row, tl.where(empty, float("inf"), row_lse * LOG2_E), mask=inside)


# fmt: off
@triton.jit(do_not_specialize=["num_queries", "num_keys", "part_size"])
def of_queries(
    query, key, value, bias, visible, grad_output, delta, lift, grad_query,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    bias_b, bias_h, bias_n, visible_b, visible_h, visible_q, visible_k, grad_b, grad_h, grad_n,
    num_heads, num_queries, num_keys, num_parts, part_size,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr, LOGIT_TYPE: tl.constexpr,
):  # fmt: on
    """Gradient of one block of queries from one part of the keys: `[groups, parts, queries, D]`."""
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
    grad_output = at(grad_output, batch, head, grad_b, grad_h)
    q = load_tile(query, first_q, query_n, num_queries, BLOCK_Q, D, D_PADDED).to(LOGIT_TYPE)
    grad = load_tile(grad_output, first_q, grad_n, num_queries, BLOCK_Q, E, E_PADDED)
    row = first_q + tl.arange(0, BLOCK_Q)
    offset = group.to(tl.int64) * num_queries
    row_delta = tl.load(delta + offset + row, mask=row < num_queries, other=0.0)
    row_lift = tl.load(lift + offset + row, mask=row < num_queries, other=float("inf"))

    grad_q = tl.zeros([BLOCK_Q, D_PADDED], tl.float32)
    first_k = part * part_size
    for start in range(first_k, tl.minimum(first_k + part_size, num_keys), BLOCK_K):
        k = load_tile(key, start, key_n, num_keys, BLOCK_K, D, D_PADDED).to(LOGIT_TYPE)
        v = load_tile(value, start, value_n, num_keys, BLOCK_K, E, E_PADDED)
        shift = key_bias(bias, visible, start, bias_n, visible_k, num_keys, MASK, BLOCK_K)
        logits = dot(q, tl.trans(k)) * LOG2_E + shift[None, :]
        if MASK == 2:
            seen = pair_mask(visible, first_q, start, visible_q, visible_k, num_queries, num_keys, BLOCK_Q, BLOCK_K)
            logits = tl.where(seen, logits, float("-inf"))
        weights = tl.exp2(tl.minimum(logits - row_lift[:, None], 0.0))
        grad_logits = weights * (dot(grad, tl.trans(v)) - row_delta[:, None])
        grad_q = dot(grad_logits.to(k.dtype), k, grad_q)
    store_tile(
        grad_query + result.to(tl.int64) * num_queries * D, first_q, D, num_queries, grad_q, BLOCK_Q, D, D_PADDED
    )


# fmt: off
@triton.jit(do_not_specialize=["num_queries", "num_keys", "part_size"])
def of_keys(
    query, key, value, bias, visible, grad_output, delta, lift, grad_key, grad_value, grad_bias,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    bias_b, bias_h, bias_n, visible_b, visible_h, visible_q, visible_k, grad_b, grad_h, grad_n,
    num_heads, num_queries, num_keys, num_parts, part_size,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr, LOGIT_TYPE: tl.constexpr,
):  # fmt: on
    """Gradients of one block of keys from one part of the queries: `[groups, parts, keys, ...]`; `None` is skipped."""
    blocks = tl.cdiv(num_keys, BLOCK_K)
    result = tl.program_id(0) // blocks  # group * num_parts + part
    group, part = result // num_parts, result % num_parts
    batch, head = group // num_heads, group % num_heads
    first_k = (tl.program_id(0) % blocks) * BLOCK_K
    key, value = at(key, batch, head, key_b, key_h), at(value, batch, head, value_b, value_h)
    if bias is not None:
        bias = at(bias, batch, head, bias_b, bias_h)
    if MASK != 0:
        visible = at(visible, batch, head, visible_b, visible_h)
    query = at(query, batch, head, query_b, query_h)
    grad_output = at(grad_output, batch, head, grad_b, grad_h)
    offset = group.to(tl.int64) * num_queries
    k = load_tile(key, first_k, key_n, num_keys, BLOCK_K, D, D_PADDED).to(LOGIT_TYPE)
    v = load_tile(value, first_k, value_n, num_keys, BLOCK_K, E, E_PADDED)
    shift = key_bias(bias, visible, first_k, bias_n, visible_k, num_keys, MASK, BLOCK_K)

    grad_k = tl.zeros([BLOCK_K, D_PADDED], tl.float32)
    grad_v = tl.zeros([BLOCK_K, E_PADDED], tl.float32)
    grad_b_sum = tl.zeros([BLOCK_K], tl.float32)
    first_q = part * part_size
    for start in range(first_q, tl.minimum(first_q + part_size, num_queries), BLOCK_Q):
        q = load_tile(query, start, query_n, num_queries, BLOCK_Q, D, D_PADDED).to(LOGIT_TYPE)
        grad = load_tile(grad_output, start, grad_n, num_queries, BLOCK_Q, E, E_PADDED)
        row = start + tl.arange(0, BLOCK_Q)
        row_lift = tl.load(lift + offset + row, mask=row < num_queries, other=float("inf"))
        logits = dot(k, tl.trans(q)) * LOG2_E + shift[:, None]
        if MASK == 2:
            seen = pair_mask(visible, first_k, start, visible_k, visible_q, num_keys, num_queries, BLOCK_K, BLOCK_Q)
            logits = tl.where(seen, logits, float("-inf"))
        weights = tl.exp2(tl.minimum(logits - row_lift[None, :], 0.0))
        if grad_value is not None:
            grad_v = dot(weights.to(grad.dtype), grad, grad_v)
        if grad_key is not None or grad_bias is not None:
            row_delta = tl.load(delta + offset + row, mask=row < num_queries, other=0.0)
            grad_logits = weights * (dot(v, tl.trans(grad)) - row_delta[None, :])
            if grad_key is not None:
                grad_k = dot(grad_logits.to(q.dtype), q, grad_k)
            if grad_bias is not None:
                grad_b_sum += tl.sum(grad_logits, 1)

    first = result.to(tl.int64) * num_keys
    if grad_key is not None:
        store_tile(grad_key + first * D, first_k, D, num_keys, grad_k, BLOCK_K, D, D_PADDED)
    if grad_value is not None:
        store_tile(grad_value + first * E, first_k, E, num_keys, grad_v, BLOCK_K, E, E_PADDED)
    if grad_bias is not None:
        keys = first_k + tl.arange(0, BLOCK_K)
        tl.store(grad_bias + first + keys, grad_b_sum, mask=keys < num_keys)
