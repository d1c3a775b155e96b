"""What the Triton kernels share: where they can run, how they are launched, how dimensions are padded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import InputError, UnsupportedError

# Kernels take logits to base 2: one multiplication less per exponential.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# How float32 is multiplied: each factor as the sum of two TF32 numbers, three products on the matrix unit. Within a
# few roundings of float32, whose own instructions ("ieee") have a fraction of that unit's speed.
EXACT = tl.constexpr("tf32x3")
# Float32's own instructions, for kernels that Triton 3.6 compiles wrongly with the above: the intra-chunk
# backward pass reads beyond its tensors on an H100 then.
IEEE = tl.constexpr("ieee")

TL_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MAX_HEAD_DIM = 256

# Programs below which a kernel with few independent outputs is split further. A constant, not the number of
# processors of the device at hand: the order of summation, and so the result, is the same on every one of them.
ENOUGH_PROGRAMS = 512


@triton.jit
def _probe():
    pass


# Whether functions decorated with `triton.jit` run in Triton's interpreter (`TRITON_INTERPRET=1`), on CPU tensors.
INTERPRETED = not isinstance(_probe, triton.JITFunction)


def padded(size: int) -> int:
    """The power of two, at least 16, that a block of `size` entries takes: what matrix instructions work on."""
    return max(16, triton.next_power_of_2(size))


def splits(programs: int, work: int, least: int) -> int:
    """In how many parts to cut `work` items that each of `programs` programs goes through, none below `least`."""
    return max(1, min(triton.cdiv(ENOUGH_PROGRAMS, max(1, programs)), work // least))


def check(*tensors: Tensor | None, head_dims: tuple[int, ...] = ()) -> None:
    """Refuse what the kernels would compute wrongly or not at all.

    Raises:
        UnsupportedError: a tensor is not on a CUDA device (and Triton's interpreter is off), has a dtype other than
            `TL_TYPES` or bool, or one of `head_dims` is not in 1 .. `MAX_HEAD_DIM`.
        InputError: tensors are on several devices.
    """
    present = [t for t in tensors if t is not None]
    for t in present:
        if t.dtype not in TL_TYPES and t.dtype != torch.bool:
            raise UnsupportedError(
                f"Triton kernels take float32, bfloat16 and float16; got {t.dtype}. Use backend='torch' for others."
            )
        if t.device != present[0].device:
            raise InputError(
                f"All tensors must be on one device; got {present[0].device} and {t.device}. Move them to one."
            )
        if t.device.type != "cuda" and not INTERPRETED and _recorded is None:
            raise UnsupportedError(
                f"Triton kernels need CUDA tensors; got one on {t.device}. Move the model to a GPU, or use "
                "backend='torch'."
            )
    for head_dim in head_dims:
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise UnsupportedError(
                f"Triton kernels take head dimensions from 1 to {MAX_HEAD_DIM}; got {head_dim}. Use backend='torch'."
            )


def rows(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous (a copy only if it is not)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@dataclass(frozen=True)
class Launch:
    """One recorded launch, enough to compile the kernel for a device that is not there."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, kernels are recorded instead of launched: how the tests compile them without a GPU."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def launch(
    kernel: Any, programs: int, *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Run `programs` programs (one grid axis: the others end at 65535) on the device of the first tensor.

    `arguments` are positional, `constants` the kernel's `tl.constexpr` parameters, all of them.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, arguments, constants, num_warps, num_stages))
        return
    if programs == 0:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constants)


# What a module exposes as `COMPILE_CASES`: calls of its public functions by name, run under `recording()` on CPU
# tensors, whose launches the tests compile for the devices we care about.
CompileCases = Mapping[str, Callable[[], object]]
