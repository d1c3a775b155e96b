"""Matrix products in float32 on CPUs, by the faster of the two libraries that torch brings along.

On AMD processors with AVX-512 MKL, which torch uses for float32, does not use AVX-512; oneDNN, which torch uses for
half precision, does: 222 instead of 85 GFLOP/s on one core for `[4096, 64] @ [64, 256]`. Both are float32 throughout.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

# Multiplications from which on the call is worth its overhead.
LARGE = 1 << 22


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor on which oneDNN multiplies faster in float32, and torch has its operator."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text()
        torch.ops.mkldnn._linear_pointwise  # noqa: B018
    except (OSError, AttributeError):
        return False
    return "AuthenticAMD" in processor


def suits_onednn(like: Tensor, multiplications: int) -> bool:
    """Whether a single product of so many multiplications should go to oneDNN."""
    return (
        like.dtype == torch.float32 and like.device.type == "cpu" and multiplications >= LARGE and onednn_is_faster()
    )


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, `[..., m, k]` and `[..., k, n]` with the same leading dimensions; one matrix may be large."""
    *lead, rows, inner = left.shape
    if left.numel() != rows * inner or not suits_onednn(left, rows * inner * right.shape[-1]):
        return left @ right
    result = matrix_product(left.reshape(rows, inner), right.reshape(inner, right.shape[-1]))
    return result.reshape(*lead, rows, -1)


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of two float32 matrices by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(_dense(left), _dense(right).mT, None, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """Without gaps between rows or columns, for which oneDNN has but a reference kernel, a thousand times slower."""
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()
