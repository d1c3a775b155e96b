"""Half of the squared length of every token, read where it lies."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import CompileCases, check, launch, padded, rows
from ..triton_tiles import at, load_tile

# Entries of a tile: enough bytes in flight for the memory, few enough for the registers of four warps.
_TILE_ENTRIES = 8192


@triton.jit(do_not_specialize=["num_rows"])
def _half_norm(
    x, result, x_b, x_h, x_n, num_heads, num_rows, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(num_rows, BLOCK)
    group, first = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK
    base = at(x, group // num_heads, group % num_heads, x_b, x_h)
    tile = load_tile(base, first, x_n, num_rows, BLOCK, D, D_PADDED).to(tl.float32)
    row = first + tl.arange(0, BLOCK)
    tl.store(result + group.to(tl.int64) * num_rows + row, tl.sum(tile * tile, 1) * 0.5, mask=row < num_rows)


def half_norm_forward(x: Tensor) -> Tensor:
    """`[batch, heads, tokens, dim]`, any strides -> float32 `[batch, heads, tokens]`. No autograd.

    Raises: UnsupportedError for another dtype or device, or `dim` above 256.
    """
    check(x, head_dims=(x.shape[-1],))
    x = rows(x)
    batch, heads, tokens, dim = x.shape
    result = torch.empty(batch, heads, tokens, dtype=torch.float32, device=x.device)
    width = padded(dim)
    block = max(16, _TILE_ENTRIES // width)
    launch(
        _half_norm,
        batch * heads * triton.cdiv(tokens, block),
        *(x, result, *x.stride()[:3], heads, tokens),
        D=dim,
        D_PADDED=width,
        BLOCK=block,
    )
    return result


def _case(dim: int) -> None:
    half_norm_forward(torch.zeros(2, 3, 40, dim, dtype=torch.bfloat16))


COMPILE_CASES: CompileCases = {f"half_norm, {dim}": partial(_case, dim) for dim in (64, 80)}
