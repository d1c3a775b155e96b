"""The kernel of `half_norm`: every token is read where it lies."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import at, load_tile


@triton.jit(do_not_specialize=["num_rows"])
def half_norm(
    x, result, x_b, x_h, x_n, num_heads, num_rows, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(num_rows, BLOCK)
    group, first = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK
    base = at(x, group // num_heads, group % num_heads, x_b, x_h)
    tile = load_tile(base, first, x_n, num_rows, BLOCK, D, D_PADDED).to(tl.float32)
    row = first + tl.arange(0, BLOCK)
    tl.store(result + group.to(tl.int64) * num_rows + row, tl.sum(tile * tile, 1) * 0.5, mask=row < num_rows)
