"""`half_norm` in Triton."""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from ..triton_common import CompileCases, check, launch, padded, rows
from .triton_kernel import half_norm

# Entries of a tile: enough bytes in flight for the memory, few enough for the registers of four warps.
_TILE_ENTRIES = 8192


def half_norm_forward(x: Tensor) -> list[Tensor]:
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
        half_norm,
        batch * heads * triton.cdiv(tokens, block),
        *(x, result, *x.stride()[:3], heads, tokens),
        D=dim,
        D_PADDED=width,
        BLOCK=block,
    )
    return [result]


def _case(dim: int) -> None:
    half_norm_forward(torch.zeros(2, 3, 40, dim, dtype=torch.bfloat16))


COMPILE_CASES: CompileCases = {f"half_norm, {dim}": partial(_case, dim) for dim in (64, 80)}
