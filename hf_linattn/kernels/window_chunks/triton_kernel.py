"""The kernels of `window_chunk_attention`. A program owns queries or keys of one window, or a tile of chunks."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import dot, load_tile, narrow, store_tile


@triton.jit
def _window_logits(
    q, k, first_query, first_key, length, keys, visible, visible_l, visible_k,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits of queries and keys of one window, -inf where a key is not visible. `[BLOCK_Q, BLOCK_K]`."""
    row = (first_query + tl.arange(0, BLOCK_Q))[:, None]
    column = (first_key + tl.arange(0, BLOCK_K))[None, :]
    seen = (row < length) & (column < keys)
    if CAUSAL:
        seen = seen & (column <= row + (keys - length))
    if MASK:
        place = row.to(tl.int64) * visible_l + column.to(tl.int64) * visible_k
        seen = seen & (tl.load(visible + place, mask=seen, other=0) != 0)
    return tl.where(seen, dot(q, tl.trans(k)), float("-inf"))


@triton.jit
def _chunk_logits(
    q, k, first_query, first_chunk, length, chunks, chunk_bias, hidden_from, hidden_to,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits of queries and chunks, -inf for a chunk that the window does not read. `[BLOCK_Q, BLOCK_K]`."""
    row, chunk = first_query + tl.arange(0, BLOCK_Q), first_chunk + tl.arange(0, BLOCK_K)
    read = (chunk < chunks) & ((chunk < hidden_from) | (chunk >= hidden_to))
    bias = tl.load(chunk_bias + chunk, mask=read, other=float("-inf")).to(tl.float32)
    return tl.where((row < length)[:, None], dot(q, tl.trans(k)) + bias[None, :], float("-inf"))


@triton.jit
def _add(total, top, mean, logits, values):
    """One step of a softmax: `mean` and `total` are relative to `exp(top)`."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp(logits - base[:, None])
    scale = tl.exp(top - base)
    total = total * scale + tl.sum(weights, 1)
    return total, new_top, dot(narrow(weights, values.dtype), values, mean * scale[:, None])


@triton.jit
def _score_gradients(logits, values, grad, lse, shift):
    """Weights, at most 1 whatever is rounded, and the gradient of the logits."""
    weights = tl.exp(tl.minimum(logits - lse[:, None], 0.0))
    return weights, weights * (dot(grad, tl.trans(values)) - shift[:, None])


@triton.jit
def _results(
    grad_output, shift, lse, place, start, length, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Gradients of some queries' output, their shift, and their log-sum-exp, +inf where nothing was visible."""
    at = place.to(tl.int64) * length
    row = start + tl.arange(0, BLOCK_Q)
    row_lse = tl.load(lse + at + row, mask=row < length, other=float("inf"))
    shifts = tl.load(shift + at + row, mask=row < length, other=0.0)
    grad = load_tile(grad_output + at * WIDTH, start, WIDTH, length, BLOCK_Q, WIDTH, WIDTH_P)
    return tl.where((row_lse < float("inf"))[:, None], grad, 0.0).to(grad.dtype), shifts, row_lse


@triton.jit
def of_queries(
    query, key, value, visible, chunk_key, chunk_bias, chunk_value, hidden_from, hidden_to, grad_output, shift, lse,
    result,
    windows, length, keys, chunks,
    query_g, query_w, query_l, key_g, key_w, key_k, value_g, value_w, value_k,
    visible_g, visible_w, visible_l, visible_k,
    BACKWARD: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, DIM_P: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The output of some queries of a window and its log-sum-exp; with BACKWARD the gradient of these queries."""
    tiles = tl.cdiv(length, BLOCK_Q)
    program = tl.program_id(0)
    start, place = (program % tiles) * BLOCK_Q, program // tiles
    window, group = (place % windows).to(tl.int64), (place // windows).to(tl.int64)
    key += group * key_g + window * key_w
    value += group * value_g + window * value_w
    if MASK:
        visible += group * visible_g + window * visible_w
    chunk_key += group * chunks * DIM
    chunk_value += group * chunks * WIDTH
    chunk_bias += group * chunks
    q = load_tile(query + group * query_g + window * query_w, start, query_l, length, BLOCK_Q, DIM, DIM_P)
    if BACKWARD:
        grad, shifts, row_lse = _results(grad_output, shift, lse, place, start, length, WIDTH, WIDTH_P, BLOCK_Q)
        summed = tl.zeros([BLOCK_Q, DIM_P], tl.float32)
    else:
        total, top = tl.zeros([BLOCK_Q], tl.float32), tl.full([BLOCK_Q], float("-inf"), tl.float32)
        summed = tl.zeros([BLOCK_Q, WIDTH_P], tl.float32)

    for first in range(0, keys, BLOCK_K):
        k = load_tile(key, first, key_k, keys, BLOCK_K, DIM, DIM_P)
        logits = _window_logits(
            q, k, start, first, length, keys, visible, visible_l, visible_k, MASK, CAUSAL, BLOCK_Q, BLOCK_K
        )
        values = load_tile(value, first, value_k, keys, BLOCK_K, WIDTH, WIDTH_P)
        if BACKWARD:
            _, grad_logits = _score_gradients(logits, values, grad, row_lse, shifts)
            summed = dot(narrow(grad_logits, k.dtype), k, summed)
        else:
            total, top, summed = _add(total, top, summed, logits, values)
    # Tiles of chunks that are hidden as a whole are skipped: `skipped` of them from tile `before` on.
    hide_from, hide_to = tl.load(hidden_from + place), tl.load(hidden_to + place)
    before = tl.cdiv(tl.minimum(tl.maximum(hide_from, 0), chunks), BLOCK_K)
    skipped = tl.maximum(tl.minimum(tl.maximum(hide_to, 0), chunks) // BLOCK_K - before, 0)
    if hide_to >= chunks:
        skipped = tl.maximum(tl.cdiv(chunks, BLOCK_K) - before, 0)
    for tile in range(0, tl.cdiv(chunks, BLOCK_K) - skipped):
        first = (tile + tl.where(tile >= before, skipped, 0)) * BLOCK_K
        k = load_tile(chunk_key, first, DIM, chunks, BLOCK_K, DIM, DIM_P)
        logits = _chunk_logits(q, k, start, first, length, chunks, chunk_bias, hide_from, hide_to, BLOCK_Q, BLOCK_K)
        values = load_tile(chunk_value, first, WIDTH, chunks, BLOCK_K, WIDTH, WIDTH_P)
        if BACKWARD:
            _, grad_logits = _score_gradients(logits, values, grad, row_lse, shifts)
            summed = dot(narrow(grad_logits, k.dtype), k, summed)
        else:
            total, top, summed = _add(total, top, summed, logits, values)

    at = place.to(tl.int64) * length
    if BACKWARD:
        store_tile(result + at * DIM, start, DIM, length, summed, BLOCK_Q, DIM, DIM_P)
    else:
        whole = tl.where(total == 0.0, 1.0, total)
        store_tile(result + at * WIDTH, start, WIDTH, length, summed / whole[:, None], BLOCK_Q, WIDTH, WIDTH_P)
        row = start + tl.arange(0, BLOCK_Q)
        tl.store(lse + at + row, tl.where(total == 0.0, float("-inf"), top + tl.log(whole)), mask=row < length)


@triton.jit
def of_keys(
    query, key, value, visible, grad_output, shift, lse, grad_key, grad_value,
    windows, length, keys,
    query_g, query_w, query_l, key_g, key_w, key_k, value_g, value_w, value_k,
    visible_g, visible_w, visible_l, visible_k,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DIM: tl.constexpr, DIM_P: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of some keys and values of a window."""
    tiles = tl.cdiv(keys, BLOCK_K)
    program = tl.program_id(0)
    first, place = (program % tiles) * BLOCK_K, program // tiles
    window, group = (place % windows).to(tl.int64), (place // windows).to(tl.int64)
    query += group * query_g + window * query_w
    if MASK:
        visible += group * visible_g + window * visible_w
    k = load_tile(key + group * key_g + window * key_w, first, key_k, keys, BLOCK_K, DIM, DIM_P)
    values = load_tile(value + group * value_g + window * value_w, first, value_k, keys, BLOCK_K, WIDTH, WIDTH_P)
    of_key = tl.zeros([BLOCK_K, DIM_P], tl.float32)
    of_value = tl.zeros([BLOCK_K, WIDTH_P], tl.float32)
    for start in range(0, length, BLOCK_Q):
        q = load_tile(query, start, query_l, length, BLOCK_Q, DIM, DIM_P)
        grad, shifts, row_lse = _results(grad_output, shift, lse, place, start, length, WIDTH, WIDTH_P, BLOCK_Q)
        logits = _window_logits(
            q, k, start, first, length, keys, visible, visible_l, visible_k, MASK, CAUSAL, BLOCK_Q, BLOCK_K
        )
        weights, grad_logits = _score_gradients(logits, values, grad, row_lse, shifts)
        of_value = dot(tl.trans(narrow(weights, grad.dtype)), grad, of_value)
        of_key = dot(tl.trans(narrow(grad_logits, q.dtype)), q, of_key)
    at = place.to(tl.int64) * keys
    store_tile(grad_key + at * DIM, first, DIM, keys, of_key, BLOCK_K, DIM, DIM_P)
    store_tile(grad_value + at * WIDTH, first, WIDTH, keys, of_value, BLOCK_K, WIDTH, WIDTH_P)


@triton.jit
def of_chunks(
    query, chunk_key, chunk_bias, chunk_value, hidden_from, hidden_to, grad_output, shift, lse,
    grad_key, grad_bias, grad_value,
    windows, length, chunks, query_g, query_w, query_l, num_parts, windows_each,
    DIM: tl.constexpr, DIM_P: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of some chunks from the queries of some windows: `[parts, groups, chunks, ...]`, to be summed."""
    tiles = tl.cdiv(chunks, BLOCK_K)
    program = tl.program_id(0)
    first, program = (program % tiles) * BLOCK_K, program // tiles
    part, group = program % num_parts, (program // num_parts).to(tl.int64)
    groups = tl.num_programs(0) // (tiles * num_parts)
    query += group * query_g
    chunk_bias += group * chunks
    k = load_tile(chunk_key + group * chunks * DIM, first, DIM, chunks, BLOCK_K, DIM, DIM_P)
    values = load_tile(chunk_value + group * chunks * WIDTH, first, WIDTH, chunks, BLOCK_K, WIDTH, WIDTH_P)
    of_key = tl.zeros([BLOCK_K, DIM_P], tl.float32)
    of_value = tl.zeros([BLOCK_K, WIDTH_P], tl.float32)
    of_bias = tl.zeros([BLOCK_K], tl.float32)
    for window in range(part * windows_each, tl.minimum(windows, (part + 1) * windows_each)):
        place = group * windows + window
        hide_from, hide_to = tl.load(hidden_from + place), tl.load(hidden_to + place)
        last = tl.minimum(first + BLOCK_K, chunks)
        if (hide_from > first) | (hide_to < last):
            for start in range(0, length, BLOCK_Q):
                q = load_tile(query + (place - group * windows) * query_w, start, query_l, length, BLOCK_Q, DIM, DIM_P)
                grad, shifts, row_lse = _results(
                    grad_output, shift, lse, place, start, length, WIDTH, WIDTH_P, BLOCK_Q
                )
                logits = _chunk_logits(
                    q, k, start, first, length, chunks, chunk_bias, hide_from, hide_to, BLOCK_Q, BLOCK_K
                )
                weights, grad_logits = _score_gradients(logits, values, grad, row_lse, shifts)
                of_value = dot(tl.trans(narrow(weights, grad.dtype)), grad, of_value)
                of_key = dot(tl.trans(narrow(grad_logits, q.dtype)), q, of_key)
                of_bias += tl.sum(grad_logits, 0)
    at = (part * groups + group) * chunks
    store_tile(grad_key + at * DIM, first, DIM, chunks, of_key, BLOCK_K, DIM, DIM_P)
    store_tile(grad_value + at * WIDTH, first, WIDTH, chunks, of_value, BLOCK_K, WIDTH, WIDTH_P)
    chunk = first + tl.arange(0, BLOCK_K)
    tl.store(grad_bias + at + chunk, of_bias, mask=chunk < chunks)
