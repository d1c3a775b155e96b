"""What a GPU does and Triton's interpreter does not."""

from __future__ import annotations

import importlib.util
import os

import torch


def round_to_nearest() -> None:
    """Triton 3.9's interpreter cuts float32 off to bfloat16. A GPU rounds to the nearest, and tests measure errors."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = InterpreterBuilder.cast_impl

    def cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return convert(self, source, target)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(rounded, tl.bfloat16)

    InterpreterBuilder.cast_impl = cast


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    round_to_nearest()
