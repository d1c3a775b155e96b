"""Pieces of kernels: tiles of matrices in and out, their products, and what a mask or a bias makes of them."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import EXACT, INTERPRETED, LOG2_E

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(left, right, start=None, PRECISION: tl.constexpr = EXACT):
    """`start + left @ right` in float32; products of float32 are not rounded to TF32.

    The interpreter multiplies the bits of bfloat16 as integers (triton 3.9), so there operands are widened first,
    which changes nothing else: products of two bfloat16 numbers are exact in float32.
    """
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    # Wide tiles of pairs of TF32 numbers do not fit into the registers.
    wide: tl.constexpr = left.shape[1] > 128 or right.shape[1] > 128
    return tl.dot(left, right, start, input_precision="ieee" if wide else PRECISION)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Rounded to the nearest of `DTYPE`. In the interpreter, whose bfloat16 truncates (triton 3.9), the result
    is still float32.
    """
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def product(left, right, DTYPE: tl.constexpr, PRECISION: tl.constexpr = EXACT):
    """`left @ right` in float32, of factors that are float32 and may be as small as exp(-87) or as large as exp(40).

    `DTYPE` is that of the inputs and says how many digits count: bfloat16 has the range; float16 has not, but TF32 has
    its digits and the range; float32 is not rounded.
    """
    if DTYPE == tl.bfloat16:
        return tl.dot(narrow(left, DTYPE), narrow(right, DTYPE))
    if DTYPE == tl.float16:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="tf32")
    return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision=PRECISION)


@triton.jit
def load_tile(
    base, start, stride, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, first_column=0
):
    """Rows `start .. start + ROWS` and columns `first_column .. first_column + PADDED` of a matrix of `limit` rows of
    `WIDTH`, as `[ROWS, PADDED]`; 0 outside of it.
    """
    row, column = tl.arange(0, ROWS), first_column + tl.arange(0, PADDED)
    address = base + ((start + row).to(tl.int64) * stride)[:, None] + column[None, :]
    inside = (start + row < limit)[:, None]
    if WIDTH == PADDED:
        return tl.load(address, mask=inside, other=0.0)
    return tl.load(address, mask=inside & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(
    base, start, stride, limit, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, first_column=0
):
    """The inverse of `load_tile`, rounded to the nearest."""
    row, column = tl.arange(0, ROWS), first_column + tl.arange(0, PADDED)
    address = base + ((start + row).to(tl.int64) * stride)[:, None] + column[None, :]
    inside = (start + row < limit)[:, None] & (column < WIDTH)[None, :]
    tl.store(address, narrow(tile, base.dtype.element_ty), mask=inside)


@triton.jit
def key_bias(bias, visible, start, bias_k, visible_k, num_keys, MASK: tl.constexpr, BLOCK_K: tl.constexpr):
    """All that depends on the key alone, to base 2: bias, mask, and -inf beyond the last key. `[BLOCK_K]`."""
    keys = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
    inside = keys < num_keys
    if bias is not None:
        result = tl.load(bias + keys * bias_k, mask=inside, other=float("-inf")).to(tl.float32) * LOG2_E
    else:
        result = tl.where(inside, 0.0, float("-inf"))
    if MASK == 1:
        seen = tl.load(visible + keys * visible_k, mask=inside, other=0)
        result = tl.where(seen != 0, result, float("-inf"))
    return result


@triton.jit
def pair_mask(base, first_row, first_column, row_n, column_n, num_rows, num_columns, R: tl.constexpr, C: tl.constexpr):
    """A tile `[R, C]` of a mask; False outside of it."""
    row = (first_row + tl.arange(0, R)).to(tl.int64)
    column = (first_column + tl.arange(0, C)).to(tl.int64)
    address = base + (row * row_n)[:, None] + (column * column_n)[None, :]
    return tl.load(address, mask=(row < num_rows)[:, None] & (column < num_columns)[None, :], other=0) != 0


@triton.jit
def at(pointer, batch, head, stride_b, stride_h):
    return pointer + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
