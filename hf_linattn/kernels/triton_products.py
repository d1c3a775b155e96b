"""Rounding to the dtype of the inputs, and products whose factors spread over many orders of magnitude."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import EXACT, INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


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
