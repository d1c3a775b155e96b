r"""Pieces of the intra-chunk kernels: one tile of slots, one chunk of queries and keys.

Query t reads key n through slot j with weight `exp(a[t, j] + c[n, j])`. Summed over slots that is a product of two
feature matrices once something is taken off `c` and added to `a`, slot by slot: a reference `r[j]`. Three choices, the
fastest first; all are exact, and no reference is that of a key which the query cannot see:

* The first key of the chunk. All queries see it. Keys may exceed it by `ROOM` nats, more would lose range; keys below
  it may vanish, because a query that does not see something much larger sees that first key.
* Halves: queries in the right half of a stretch of the chunk, keys in the left one, whose maximum is the reference.
  Stretches down to twice `SEGMENT`; what is left are segments, each with its own first key.
* Where keys of a segment exceed even that by more than `ROOM`: key by key, without features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common import EXACT, IEEE
from ..triton_tiles import dot, load_tile, product

ROOM = tl.constexpr(40.0)


@triton.jit
def logits(
    tokens, token_bias, first_token, token_stride, end, slots, slot_bias, first_slot, slot_stride, num_slots,
    CHUNK: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr = EXACT,
):  # fmt: skip
    """`token . slot + biases`, `[CHUNK, TILE]`; `token_bias` is loaded, or None. -inf beyond the last slot."""
    slot = first_slot + tl.arange(0, TILE)
    total = tl.zeros([CHUNK, TILE], tl.float32)
    for start in range(0, DIM, BLOCK_D):
        left = load_tile(tokens, first_token, token_stride, end, CHUNK, DIM, BLOCK_D, start)
        right = load_tile(slots, first_slot, slot_stride, num_slots, TILE, DIM, BLOCK_D, start)
        if left.dtype != right.dtype:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = dot(left, tl.trans(right), total, PRECISION)
    bias = tl.load(slot_bias + slot, mask=slot < num_slots, other=float("-inf"))
    if token_bias is not None:
        total += token_bias[:, None]
    return total + bias[None, :]


@triton.jit
def _spread(z, SPAN: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """`[CHUNK // SPAN, TILE]`, every row repeated `SPAN` times."""
    return tl.reshape(tl.broadcast_to(z[:, None, :], [CHUNK // SPAN, SPAN, TILE]), [CHUNK, TILE])


@triton.jit
def _span_sum(z, SPAN: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Sums over stretches of `SPAN` rows, for every row that of its stretch."""
    if SPAN == CHUNK:
        return tl.broadcast_to(tl.sum(z, 0)[None, :], [CHUNK, TILE])
    return _spread(tl.sum(tl.reshape(z, [CHUNK // SPAN, SPAN, TILE]), 1), SPAN, CHUNK, TILE)


@triton.jit
def first_keys(key_bias, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """For every row the first key in its stretch of `SPAN` that is not masked; `CHUNK` if there is none. `[CHUNK]`."""
    candidate = tl.where(key_bias > float("-inf"), tl.arange(0, CHUNK), CHUNK)
    first = tl.min(tl.reshape(candidate, [CHUNK // SPAN, SPAN]), 1)
    return tl.reshape(tl.broadcast_to(first[:, None], [CHUNK // SPAN, SPAN]), [CHUNK])


@triton.jit
def first_reference(c, first, SPAN: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """What first keys weigh, for every row that of its stretch `[CHUNK, TILE]`, and by how much others exceed it."""
    row = tl.arange(0, CHUNK)
    reference = _span_sum(tl.where((row == first)[:, None], c, 0.0), SPAN, CHUNK, TILE)
    return reference, tl.max(tl.max(c - _finite(reference), 1), 0)


@triton.jit
def half_reference(c, HALF: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """The largest `c` in the left half of every stretch of `2 * HALF` rows, for all of its rows. `[CHUNK, TILE]`."""
    left = (tl.arange(0, CHUNK) // HALF) % 2 == 0
    z = tl.reshape(tl.where(left[:, None], c, float("-inf")), [CHUNK // (2 * HALF), 2 * HALF, TILE])
    return _spread(tl.max(z, 1), 2 * HALF, CHUNK, TILE)


@triton.jit
def _finite(x):
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _together(SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """Whether a query and a key are in the same stretch, `[CHUNK, CHUNK]`."""
    row = tl.arange(0, CHUNK)
    return (row // SPAN)[:, None] == (row // SPAN)[None, :]


# -- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _rescaled(weights, top, query):
    """Weights relative to the largest logit of a query so far, and those queries' features."""
    new_top = tl.maximum(top, tl.max(query, 1))
    base = _finite(new_top)
    return weights * tl.exp(top - base)[:, None], new_top, tl.exp(query - base[:, None])


@triton.jit
def _add_first(weights, top, a, c, reference, first, DTYPE: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """Add what queries read within stretches of `SPAN`; entries of keys that are not visible are left to be masked."""
    sees = tl.arange(0, CHUNK) >= first
    query = tl.where(sees[:, None], a + reference, float("-inf"))
    weights, top, query = _rescaled(weights, top, query)
    pairs = product(query, tl.trans(tl.exp(c - _finite(reference))), DTYPE)
    if SPAN == CHUNK:
        return weights + pairs, top
    return weights + tl.where(_together(SPAN, CHUNK), pairs, 0.0), top


@triton.jit
def _add_halves(weights, top, a, c, DTYPE: tl.constexpr, HALF: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Add what right halves of stretches read from left ones."""
    left = ((tl.arange(0, CHUNK) // HALF) % 2 == 0)[:, None]
    reference = half_reference(c, HALF, CHUNK, TILE)
    weights, top, query = _rescaled(weights, top, tl.where(left, float("-inf"), a + reference))
    key = tl.exp(tl.where(left, c - _finite(reference), float("-inf")))
    pairs = product(query, tl.trans(key), DTYPE)
    return weights + tl.where(_together(2 * HALF, CHUNK), pairs, 0.0), top


@triton.jit
def _add_one_by_one(weights, top, a, c, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Add what queries read within segments, one key of each at a time."""
    row = tl.arange(0, CHUNK)
    for place in range(0, SEGMENT):
        key = _span_sum(tl.where((row % SEGMENT == place)[:, None], c, 0.0), SEGMENT, CHUNK, TILE)
        query = tl.where((row % SEGMENT >= place)[:, None], a + key, float("-inf"))
        weights, top, query = _rescaled(weights, top, query)
        number = row // SEGMENT * SEGMENT + place
        weights += tl.where(row[None, :] == number[:, None], tl.sum(query, 1)[:, None], 0.0)
    return weights, top


@triton.jit
def add_tile(
    weights, top, a, c, first, key_bias,
    DTYPE: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add to `weights` `[CHUNK, CHUNK]`, which are relative to `exp(top)`, what one tile of slots carries."""
    reference, above = first_reference(c, first, CHUNK, CHUNK, TILE)
    if above <= ROOM:
        weights, top = _add_first(weights, top, a, c, reference, first, DTYPE, CHUNK, CHUNK)
    else:
        # Halves of CHUNK / 2 down to SEGMENT.
        if CHUNK >= 128 and SEGMENT <= 64:
            weights, top = _add_halves(weights, top, a, c, DTYPE, 64, CHUNK, TILE)
        if CHUNK >= 64 and SEGMENT <= 32:
            weights, top = _add_halves(weights, top, a, c, DTYPE, 32, CHUNK, TILE)
        if CHUNK >= 32 and SEGMENT <= 16:
            weights, top = _add_halves(weights, top, a, c, DTYPE, 16, CHUNK, TILE)
        own_first = first_keys(key_bias, SEGMENT, CHUNK)
        reference, above = first_reference(c, own_first, SEGMENT, CHUNK, TILE)
        if above <= ROOM:
            weights, top = _add_first(weights, top, a, c, reference, own_first, DTYPE, SEGMENT, CHUNK)
        else:
            weights, top = _add_one_by_one(weights, top, a, c, SEGMENT, CHUNK, TILE)
    return weights, top


# -- backward --------------------------------------------------------------------------------------------------------
# With p[t, n, j] = exp(a + c - lse) and X[t, n] = dO_t . (v_n - O_t) + dlse_t:
# da[t, j] = sum_n p X, dc[n, j] = sum_t p X, and dv_n = sum_t (sum_j p) dO_t. The sums over slots are `shares`.
# The lse comes off what the forward pass has compared with it, digit by digit, and no query's feature exceeds 1.


@triton.jit
def _relative(logits, lse):
    """Weights of `logits`, `[CHUNK, TILE]`, relative to the lse of each query."""
    return tl.exp(tl.minimum(logits - lse[:, None], 0.0))


@triton.jit
def _from_features(shares, grad_a, grad_c, query, key, grads, together, DTYPE: tl.constexpr):
    grads = tl.where(together, grads, 0.0)
    shares += tl.where(together, product(query, tl.trans(key), DTYPE, IEEE), 0.0)
    grad_a += query * product(grads, key, DTYPE, IEEE)
    grad_c += key * product(tl.trans(grads), query, DTYPE, IEEE)
    return shares, grad_a, grad_c


@triton.jit
def _grad_first(
    shares, grad_a, grad_c, a, c, lse, grads, reference, first, DTYPE, SPAN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sees = tl.arange(0, CHUNK) >= first
    query = _relative(tl.where(sees[:, None], a + reference, float("-inf")), lse)
    key = tl.exp(c - _finite(reference))
    return _from_features(shares, grad_a, grad_c, query, key, grads, _together(SPAN, CHUNK), DTYPE)


@triton.jit
def _grad_halves(shares, grad_a, grad_c, a, c, lse, grads, DTYPE, HALF: tl.constexpr, CHUNK: tl.constexpr, TILE):
    left = ((tl.arange(0, CHUNK) // HALF) % 2 == 0)[:, None]
    reference = half_reference(c, HALF, CHUNK, TILE)
    query = _relative(tl.where(left, float("-inf"), a + reference), lse)
    key = tl.exp(tl.where(left, c - _finite(reference), float("-inf")))
    return _from_features(shares, grad_a, grad_c, query, key, grads, _together(2 * HALF, CHUNK), DTYPE)


@triton.jit
def _grad_one_by_one(shares, grad_a, grad_c, a, c, lse, grads, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, TILE):
    row = tl.arange(0, CHUNK)
    for place in range(0, SEGMENT):
        own = (row % SEGMENT == place)[:, None]
        key = _span_sum(tl.where(own, c, 0.0), SEGMENT, CHUNK, TILE)
        weight = _relative(tl.where((row % SEGMENT >= place)[:, None], a + key, float("-inf")), lse)
        here = row[None, :] == (row // SEGMENT * SEGMENT + place)[:, None]
        shares += tl.where(here, tl.sum(weight, 1)[:, None], 0.0)
        weight *= tl.sum(tl.where(here, grads, 0.0), 1)[:, None]
        grad_a += weight
        grad_c += tl.where(own, _span_sum(weight, SEGMENT, CHUNK, TILE), 0.0)
    return shares, grad_a, grad_c


@triton.jit
def grad_tile(
    shares, a, c, lse, grads, first, key_bias,
    DTYPE: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of `a` and `c`, `[CHUNK, TILE]`, and `shares` with those of this tile; those of keys that are not
    visible are left to be masked. `grads` is `X`, 0 where a key is not visible; `lse` +inf where a query sees none.
    """
    grad_a, grad_c = tl.zeros([CHUNK, TILE], tl.float32), tl.zeros([CHUNK, TILE], tl.float32)
    reference, above = first_reference(c, first, CHUNK, CHUNK, TILE)
    if above <= ROOM:
        shares, grad_a, grad_c = _grad_first(
            shares, grad_a, grad_c, a, c, lse, grads, reference, first, DTYPE, CHUNK, CHUNK
        )
    else:
        if CHUNK >= 128 and SEGMENT <= 64:
            shares, grad_a, grad_c = _grad_halves(shares, grad_a, grad_c, a, c, lse, grads, DTYPE, 64, CHUNK, TILE)
        if CHUNK >= 64 and SEGMENT <= 32:
            shares, grad_a, grad_c = _grad_halves(shares, grad_a, grad_c, a, c, lse, grads, DTYPE, 32, CHUNK, TILE)
        if CHUNK >= 32 and SEGMENT <= 16:
            shares, grad_a, grad_c = _grad_halves(shares, grad_a, grad_c, a, c, lse, grads, DTYPE, 16, CHUNK, TILE)
        own_first = first_keys(key_bias, SEGMENT, CHUNK)
        reference, above = first_reference(c, own_first, SEGMENT, CHUNK, TILE)
        if above <= ROOM:
            shares, grad_a, grad_c = _grad_first(
                shares, grad_a, grad_c, a, c, lse, grads, reference, own_first, DTYPE, SEGMENT, CHUNK
            )
        else:
            shares, grad_a, grad_c = _grad_one_by_one(shares, grad_a, grad_c, a, c, lse, grads, SEGMENT, CHUNK, TILE)
    return shares, grad_a, grad_c
