"""`short_slot_attention` in C (`native.c`). Float64 and large logits go to `torch_kernel.py`."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..native.build import library
from ..native.threads import in_parts
from . import torch_kernel
from .inputs import ShortInputs, ShortOptions, token_of_place

_SOURCE = Path(__file__).with_name("native.c")
# `Call` of native.c: sizes, factors, indices, and tensors with three strides each.
_CALL = struct.Struct("=12q4d2q104q")
_NONE = (0, 0, 0, 0)


def short_forward(inputs: ShortInputs, *options: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `short_slot_attention` describes them."""
    call = _Call.of(inputs, options)
    if call is not None:
        query, value = call.inputs.query, call.inputs.value
        output = value.new_empty((*query.shape[:-1], value.shape[-1]))
        lse = query.new_empty(query.shape[:-1]) if call.options.with_lse else None
        if call.run("short_forward", [output, lse]):
            if lse is None:
                lse = query.new_full(query.shape[:-1], float("nan"))
            return output if output.dtype == inputs.value.dtype else output.to(inputs.value.dtype), lse
    return torch_kernel.short_forward(inputs, *options)


def short_backward(
    grads: AttentionState, inputs: ShortInputs, results: Sequence[Tensor], needs: Sequence[bool], *options: Any
) -> list[Tensor | None]:
    """Gradients of the tensors of `inputs`, where `needs` says so."""
    call = _Call.of(inputs, options)
    if call is not None:
        upstream = [_plain(grads.output), _plain(grads.lse) if call.options.with_lse else None]
        found = [
            z.new_empty(z.shape, dtype=torch.float32) if needed and z is not None else None
            for z, needed in zip(inputs, needs, strict=True)
        ]
        if call.run("short_backward", upstream, found):
            return [
                grad if grad is None or z is None or grad.dtype == z.dtype else grad.to(z.dtype)
                for grad, z in zip(found, inputs, strict=True)
            ]
    return torch_kernel.short_backward(grads, inputs, results, needs, *options)


class _Call:
    """One call of the C functions, on float32 tensors whose last dimension has no gaps."""

    def __init__(self, functions: ctypes.CDLL, inputs: ShortInputs, options: ShortOptions) -> None:
        self.functions, self.inputs, self.options = functions, inputs, options

    @classmethod
    def of(cls, inputs: ShortInputs, options: Sequence[Any]) -> _Call | None:
        """`None` where C cannot compute it."""
        if inputs.query.dtype == torch.float64 or not inputs.query.numel():
            return None
        functions = library(_SOURCE)
        if functions is None:
            return None
        return cls(functions, ShortInputs(*[_plain(z) for z in inputs]), ShortOptions._make(options))

    def run(self, name: str, others: Sequence[Tensor | None], grads: Sequence[Tensor | None] = ()) -> bool:
        """Whether it was computed: not with logits for which float32 has too few digits.

        others: Output and log-sum-exp, or their gradients.
        """
        inputs, options, is_backward = self.inputs, self.options, len(grads) > 0
        batch, tokens, heads, dim = inputs.query.shape
        slot_rows, _, slots, query_dim = inputs.query_slots.shape
        places = token_of_place(tokens, options.places, tuple(options.grid))
        value_dim, key_dim = inputs.value.shape[-1], inputs.key_slots.shape[-1]
        of_others = [*_described(others[0], 3), *_described(others[1], 3)]
        of_inputs, nothing = _described_inputs(inputs), _NONE * 2
        values = [*(nothing if is_backward else of_others), *of_inputs, *(of_others if is_backward else nothing)]
        values += _described_inputs(grads) if is_backward else _NONE * len(inputs)
        probes = _probes(tuple(options.probes)) if options.probes else None
        packed = _CALL.pack(
            *(batch, heads, slot_rows, options.places, len(places), slots, dim, value_dim, query_dim, key_dim),
            *(options.spreads, len(options.probes)),
            *(options.root, options.query_norm, options.key_norm, options.shift),
            *(places.data_ptr(), 0 if probes is None else probes.data_ptr()),
            *values,
        )
        function = getattr(self.functions, name)
        pairs, groups = batch * heads, slot_rows * heads

        def part(first: int, last: int) -> int:
            return function(packed, ctypes.c_long(first), ctypes.c_long(last))

        cost = 4.0 * pairs * tokens * (2 * slots + options.places) * (dim + value_dim)
        status = in_parts(part, groups if is_backward else pairs, cost)
        if status == 2:
            raise MemoryError(f"{name} of {tokens} tokens")
        return status == 0


def _plain(z: Tensor | None) -> Any:
    """In float32, with the last dimension next to each other in memory."""
    if z is None:
        return None
    if z.dtype != torch.float32:
        z = z.float()
    return z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous()


def _described(z: Tensor | None, dims: int) -> tuple[int, ...]:
    """Address and strides in numbers; zeros for none."""
    return _NONE if z is None else (z.data_ptr(), *z.stride()[:dims])


def _described_inputs(inputs: Sequence[Tensor | None]) -> list[int]:
    found: list[int] = []
    for z in inputs:
        found += _described(z, 3)
    return found


@functools.lru_cache(maxsize=128)
def _probes(probes: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(probes, dtype=torch.int64, device="cpu")
