"""Without a GPU, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import torch


def interpret_standard_functions() -> None:
    """Triton decides when it is imported whether functions like `tl.sum` are interpreted or compiled.

    Importing `torch._dynamo`, and with it most models, has imported Triton before this file could ask for it.
    """
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    for name, function in list(vars(tl.standard).items()):
        if isinstance(function, triton.JITFunction):
            interpreted = InterpretedFunction(function.fn)
            for module in (tl.standard, tl):
                if getattr(module, name, None) is function:
                    setattr(module, name, interpreted)


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


if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1":
        interpret_standard_functions()
        round_to_nearest()
