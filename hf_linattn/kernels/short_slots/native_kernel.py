"""`short_slot_attention` in C (`native.c`). Float64 and large logits go to `torch_kernel.py`."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..native.build import library
from ..native.calls import addresses, in_parts
from . import torch_kernel
from .inputs import OF_TOKENS, ShortInputs, ShortOptions, token_of_place

_SOURCE = Path(__file__).with_name("native.c")
# `Call` of native.c: sizes, factors, indices, and tensors with three strides each.
_CALL = struct.Struct("=12q4d2q104q")
_STRIDES = 3
_NO_TENSORS = (None,) * (2 + len(ShortInputs._fields))


def short_forward(inputs: ShortInputs, *options: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `short_slot_attention` describes them."""
    plain, of_call = _plain(inputs), ShortOptions._make(options)
    if plain is not None:
        shape = plain.query.shape[:-1]
        output = plain.value.new_empty((*shape, plain.value.shape[-1]))
        lse = plain.query.new_empty(shape) if of_call.with_lse else None
        if _run("short_forward", plain, of_call, [output, lse, *plain, *_NO_TENSORS]):
            if lse is None:
                lse = plain.query.new_full(shape, float("nan"))
            return output if output.dtype == inputs.value.dtype else output.to(inputs.value.dtype), lse
    return torch_kernel.short_forward(inputs, *options)


def short_backward(
    grads: AttentionState, inputs: ShortInputs, results: Sequence[Tensor], needs: Sequence[bool], *options: Any
) -> list[Tensor | None]:
    """Gradients of the tensors of `inputs`, where `needs` says so."""
    plain, of_call = _plain(inputs), ShortOptions._make(options)
    if plain is not None:
        grad_output = grads.output.float()
        if grad_output.stride(-1) != 1:
            grad_output = grad_output.contiguous()
        upstream = [grad_output, grads.lse.float() if of_call.with_lse else None]
        found: list[Any] = [
            z.new_empty(z.shape) if needed and z is not None else None for z, needed in zip(plain, needs, strict=True)
        ]
        if _run("short_backward", plain, of_call, [None, None, *plain, *upstream, *found], is_backward=True):
            if inputs.query.dtype == torch.float32 == inputs.value.dtype:
                return found
            return [
                grad if grad is None or z is None else grad.to(z.dtype) for grad, z in zip(found, inputs, strict=True)
            ]
    return torch_kernel.short_backward(grads, inputs, results, needs, *options)


@torch.compiler.assume_constant_result
def is_compiled() -> bool:
    """Whether C computes float32 on this machine."""
    return library(_SOURCE) is not None


def _plain(inputs: ShortInputs) -> ShortInputs | None:
    """In float32, vectors and biases of slots without gaps; `None` for what C does not compute."""
    if inputs.query.dtype == torch.float64 or not inputs.query.numel() or library(_SOURCE) is None:
        return None
    found: list[Any] = []
    for place, z in enumerate(inputs):
        if z is not None and z.dtype != torch.float32:
            z = z.float()
        if z is not None and z.stride(-1) != 1 and (z.ndim == 4 or place >= OF_TOKENS):
            z = z.contiguous()
        found.append(z)
    return ShortInputs._make(found)


def _run(
    name: str, inputs: ShortInputs, options: ShortOptions, tensors: Sequence[Tensor | None], is_backward: bool = False
) -> bool:
    """Whether it was computed: not with logits for which float32 has too few digits.

    tensors: Those of `Call`, in its order.
    """
    batch, tokens, heads, dim = inputs.query.shape
    slot_rows, _, slots, query_dim = inputs.query_slots.shape
    places = token_of_place(tokens, options.places, tuple(options.grid))
    value_dim, key_dim = inputs.value.shape[-1], inputs.key_slots.shape[-1]
    probes = _numbers(tuple(options.probes))
    packed = _CALL.pack(
        *(batch, heads, slot_rows, options.places, len(places), slots, dim, value_dim, query_dim, key_dim),
        *(options.spreads, len(options.probes)),
        *(options.root, options.query_norm, options.key_norm, options.shift),
        *(places.data_ptr(), probes.data_ptr()),
        *addresses(tensors, _STRIDES),
    )
    function = getattr(library(_SOURCE), name)
    count = (slot_rows if is_backward else batch) * heads
    cost = 4.0 * batch * heads * tokens * (2 * slots + options.places) * (dim + value_dim)
    return in_parts(function, packed, count, cost, (tensors, places, probes))


@functools.lru_cache(maxsize=128)
def _numbers(numbers: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")
