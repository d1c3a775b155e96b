"""The intra-chunk kernels: a program owns one chunk, or one tile of slots, and walks over the other."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import IEEE
from ..triton_tiles import dot, load_tile, product, store_tile
from .triton_tiles import add_tile, first_keys, grad_tile, logits


@triton.jit
def forward(
    query, query_slots, query_slot_bias, key, key_bias, key_slots, key_slot_bias, value,
    output, lse,
    tokens, slots, query_g, query_t, query_slots_g, query_slots_m, query_slot_bias_g,
    key_g, key_t, key_slots_g, key_slots_m, key_slot_bias_g, value_g, value_t,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, SEGMENT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    chunks = tokens // CHUNK
    group, start = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks) * CHUNK
    row = tl.arange(0, CHUNK)
    at = group * tokens + start + row
    bias = tl.load(key_bias + at)
    visible = (row[None, :] <= row[:, None]) & (bias > float("-inf"))[None, :]
    first = first_keys(bias, CHUNK, CHUNK)
    query += group * query_g
    key += group * key_g
    query_slots += group * query_slots_g
    query_slot_bias += group * query_slot_bias_g
    key_slots += group * key_slots_g
    key_slot_bias += group * key_slot_bias_g

    top = tl.full([CHUNK], float("-inf"), tl.float32)
    weights = tl.zeros([CHUNK, CHUNK], tl.float32)
    for slot in range(0, slots, TILE):
        a = logits(
            query, None, start, query_t, tokens, query_slots, query_slot_bias, slot, query_slots_m, slots,
            CHUNK, TILE, DIM, BLOCK_D,
        )  # fmt: skip
        c = logits(
            key, bias, start, key_t, tokens, key_slots, key_slot_bias, slot, key_slots_m, slots,
            CHUNK, TILE, DIM, BLOCK_D,
        )  # fmt: skip
        weights, top = add_tile(weights, top, a, c, first, bias, DTYPE, SEGMENT, CHUNK, TILE)

    weights = tl.where(visible, weights, 0.0)
    total = tl.sum(weights, 1)
    whole = tl.where(total == 0.0, 1.0, total)
    weights /= whole[:, None]
    tl.store(lse + at, tl.where(total == 0.0, float("-inf"), top + tl.log(whole)))
    for e in range(0, WIDTH, BLOCK_E):
        values = load_tile(value + group * value_g, start, value_t, tokens, CHUNK, WIDTH, BLOCK_E, e)
        result = product(weights, values, DTYPE)
        store_tile(output + group * tokens * WIDTH, start, WIDTH, tokens, result, CHUNK, WIDTH, BLOCK_E, e)


@triton.jit
def _score_gradients(
    grad_output, grad_lse, value, output, lse, group, start, tokens, value_g, value_t, visible,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`X[t, n]`, 0 for a key that is not visible, and the log-sum-exp of every query, +inf where it sees nothing."""
    at = group * tokens + start + tl.arange(0, CHUNK)
    row_lse = tl.load(lse + at)
    seen = row_lse > float("-inf")
    shift = tl.load(grad_lse + at)
    grads = tl.zeros([CHUNK, CHUNK], tl.float32)
    for e in range(0, WIDTH, BLOCK_E):
        grad = load_tile(grad_output + group * tokens * WIDTH, start, WIDTH, tokens, CHUNK, WIDTH, BLOCK_E, e)
        result = load_tile(output + group * tokens * WIDTH, start, WIDTH, tokens, CHUNK, WIDTH, BLOCK_E, e)
        values = load_tile(value + group * value_g, start, value_t, tokens, CHUNK, WIDTH, BLOCK_E, e)
        shift -= tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
        grads = dot(grad, tl.trans(values), grads, IEEE)
    grads = tl.where(visible & seen[:, None], grads + shift[:, None], 0.0)
    return grads, tl.where(seen, row_lse, float("inf"))


@triton.jit
def backward_tokens(
    query, query_slots, query_slot_bias, key, key_bias, key_slots, key_slot_bias, value,
    grad_output, grad_lse, output, lse, grad_query, grad_key, grad_key_bias, grad_value,
    tokens, slots, query_g, query_t, query_slots_g, query_slots_m, query_slot_bias_g,
    key_g, key_t, key_slots_g, key_slots_m, key_slot_bias_g, value_g, value_t,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, SEGMENT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of `query`, `key`, `key_bias` and `value`.

    A program owns a chunk and `BLOCK_D` columns of `query` and `key`.
    """
    parts: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    chunks = tokens // CHUNK
    part, program = tl.program_id(0) % parts, tl.program_id(0) // parts
    group, start = (program // chunks).to(tl.int64), (program % chunks) * CHUNK
    row = tl.arange(0, CHUNK)
    at = group * tokens + start + row
    bias = tl.load(key_bias + at)
    visible = (row[None, :] <= row[:, None]) & (bias > float("-inf"))[None, :]
    first = first_keys(bias, CHUNK, CHUNK)
    query += group * query_g
    key += group * key_g
    query_slots += group * query_slots_g
    query_slot_bias += group * query_slot_bias_g
    key_slots += group * key_slots_g
    key_slot_bias += group * key_slot_bias_g

    grads, row_lse = _score_gradients(
        grad_output, grad_lse, value, output, lse, group, start, tokens, value_g, value_t, visible,
        WIDTH, BLOCK_E, CHUNK,
    )  # fmt: skip
    first_column = part * BLOCK_D
    column = first_column + tl.arange(0, BLOCK_D)
    shares = tl.zeros([CHUNK, CHUNK], tl.float32)
    total_query, total_key = tl.zeros([CHUNK, BLOCK_D], tl.float32), tl.zeros([CHUNK, BLOCK_D], tl.float32)
    total_bias = tl.zeros([CHUNK], tl.float32)
    for slot in range(0, slots, TILE):
        a = logits(
            query, None, start, query_t, tokens, query_slots, query_slot_bias, slot, query_slots_m, slots,
            CHUNK, TILE, DIM, BLOCK_D, IEEE
        )  # fmt: skip
        c = logits(
            key, bias, start, key_t, tokens, key_slots, key_slot_bias, slot, key_slots_m, slots,
            CHUNK, TILE, DIM, BLOCK_D, IEEE
        )  # fmt: skip
        shares, grad_a, grad_c = grad_tile(shares, a, c, row_lse, grads, first, bias, DTYPE, SEGMENT, CHUNK, TILE)
        number = (slot + tl.arange(0, TILE)).to(tl.int64)
        inside = (number < slots)[:, None] & (column < DIM)[None, :]
        vectors = tl.load(query_slots + (number * query_slots_m)[:, None] + column[None, :], mask=inside, other=0.0)
        total_query += product(grad_a, vectors, DTYPE, IEEE)
        vectors = tl.load(key_slots + (number * key_slots_m)[:, None] + column[None, :], mask=inside, other=0.0)
        total_key += product(grad_c, vectors, DTYPE, IEEE)
        total_bias += tl.sum(grad_c, 1)

    to = group * tokens * DIM
    store_tile(grad_query + to, start, DIM, tokens, total_query, CHUNK, DIM, BLOCK_D, first_column)
    store_tile(grad_key + to, start, DIM, tokens, total_key, CHUNK, DIM, BLOCK_D, first_column)
    if part == 0:
        tl.store(grad_key_bias + at, total_bias)
        shares = tl.trans(tl.where(visible, shares, 0.0))
        for e in range(0, WIDTH, BLOCK_E):
            grad = load_tile(grad_output + group * tokens * WIDTH, start, WIDTH, tokens, CHUNK, WIDTH, BLOCK_E, e)
            grad = tl.where((row_lse < float("inf"))[:, None], grad, 0.0)
            result = product(shares, grad, DTYPE, IEEE)
            store_tile(grad_value + group * tokens * WIDTH, start, WIDTH, tokens, result, CHUNK, WIDTH, BLOCK_E, e)


@triton.jit
def backward_slots(
    query, query_slots, query_slot_bias, key, key_bias, key_slots, key_slot_bias, value,
    grad_output, grad_lse, output, lse, grad_query_slots, grad_query_slot_bias, grad_key_slots, grad_key_slot_bias,
    tokens, slots, query_g, query_t, query_slots_g, query_slots_m, query_slot_bias_g,
    key_g, key_t, key_slots_g, key_slots_m, key_slot_bias_g, value_g, value_t,
    num_parts, chunks_each,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, SEGMENT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of both kinds of slots and their biases, from some of the chunks: `[parts, groups, slots, ...]`.

    A program owns a tile of slots, `BLOCK_D` columns of them and `chunks_each` chunks.
    """
    columns: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    tiles = tl.cdiv(slots, TILE)
    program = tl.program_id(0)
    of_column, program = program % columns, program // columns
    slot, program = (program % tiles) * TILE, program // tiles
    part, group = program % num_parts, (program // num_parts).to(tl.int64)
    groups = tl.num_programs(0) // (columns * tiles * num_parts)
    row = tl.arange(0, CHUNK)
    first_column = of_column * BLOCK_D
    column = first_column + tl.arange(0, BLOCK_D)
    query += group * query_g
    key += group * key_g
    query_slots += group * query_slots_g
    query_slot_bias += group * query_slot_bias_g
    key_slots += group * key_slots_g
    key_slot_bias += group * key_slot_bias_g

    total_query, total_key = tl.zeros([TILE, BLOCK_D], tl.float32), tl.zeros([TILE, BLOCK_D], tl.float32)
    total_query_bias, total_key_bias = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    chunks = tokens // CHUNK
    for chunk in range(part * chunks_each, tl.minimum(chunks, (part + 1) * chunks_each)):
        start = chunk * CHUNK
        at = group * tokens + start + row
        bias = tl.load(key_bias + at)
        visible = (row[None, :] <= row[:, None]) & (bias > float("-inf"))[None, :]
        first = first_keys(bias, CHUNK, CHUNK)
        grads, row_lse = _score_gradients(
            grad_output, grad_lse, value, output, lse, group, start, tokens, value_g, value_t, visible,
            WIDTH, BLOCK_E, CHUNK,
        )  # fmt: skip
        a = logits(
            query, None, start, query_t, tokens, query_slots, query_slot_bias, slot, query_slots_m, slots,
            CHUNK, TILE, DIM, BLOCK_D, IEEE
        )  # fmt: skip
        c = logits(
            key, bias, start, key_t, tokens, key_slots, key_slot_bias, slot, key_slots_m, slots,
            CHUNK, TILE, DIM, BLOCK_D, IEEE
        )  # fmt: skip
        shares = tl.zeros([CHUNK, CHUNK], tl.float32)
        shares, grad_a, grad_c = grad_tile(shares, a, c, row_lse, grads, first, bias, DTYPE, SEGMENT, CHUNK, TILE)
        inside = (column < DIM)[None, :]
        place = (start + row).to(tl.int64)
        vectors = tl.load(query + (place * query_t)[:, None] + column[None, :], mask=inside, other=0.0)
        total_query += product(tl.trans(grad_a), vectors, DTYPE, IEEE)
        vectors = tl.load(key + (place * key_t)[:, None] + column[None, :], mask=inside, other=0.0)
        total_key += product(tl.trans(grad_c), vectors, DTYPE, IEEE)
        total_query_bias += tl.sum(grad_a, 0)
        total_key_bias += tl.sum(grad_c, 0)

    to = (part * groups + group) * slots
    store_tile(grad_query_slots + to * DIM, slot, DIM, slots, total_query, TILE, DIM, BLOCK_D, first_column)
    store_tile(grad_key_slots + to * DIM, slot, DIM, slots, total_key, TILE, DIM, BLOCK_D, first_column)
    if of_column == 0:
        number = slot + tl.arange(0, TILE)
        tl.store(grad_query_slot_bias + to + number, total_query_bias, mask=number < slots)
        tl.store(grad_key_slot_bias + to + number, total_key_bias, mask=number < slots)
