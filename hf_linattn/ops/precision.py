"""The dtype that attention is computed in."""

from __future__ import annotations

import torch
from torch import Tensor

_MATRIX_UNIT = torch.cpu._is_amx_tile_supported()


def compute_dtype(query: Tensor, key: Tensor, value: Tensor, in_half: tuple[str, ...] = ()) -> torch.dtype:
    """What attention computes in: at least float32, unless halves are multiplied faster (`stays_half`)."""
    # They may differ under autocast, where rotary positions lift queries and keys to float32.
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    return dtype if stays_half(dtype, query.device.type, in_half) else torch.promote_types(dtype, torch.float32)


def stays_half(dtype: torch.dtype, device_type: str, devices: tuple[str, ...]) -> bool:
    """Whether a function that takes halves on these types of devices gets them.

    On CPUs only with a matrix unit (AMX): with vector instructions alone, float32 was as fast.
    """
    if dtype not in (torch.float16, torch.bfloat16) or device_type not in devices:
        return False
    return device_type == "cuda" or (device_type == "cpu" and dtype == torch.bfloat16 and _MATRIX_UNIT)
