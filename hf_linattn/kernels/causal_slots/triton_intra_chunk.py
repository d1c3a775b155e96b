r"""Causal attention through slots inside chunks, in Triton.

Query t reads key n <= t of its own chunk with weight `exp(l[t, n])`, `l[t, n] = logsumexp_j(a[t, j] + c[n, j])`, where
`a` and `c` are log-weights of queries and keys for the slots. All of it is one softmax over pairs of a key and a slot.
A program owns one chunk and walks over tiles of slots; features are never stored. `_near_tiles.py` says how their
range is kept in bounds without a query depending on a key that it cannot see.

Nothing of size tokens x slots is stored, there are no atomic additions, and two runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import InputError
from ..triton_common import CompileCases, check, launch, padded, rows, splits
from . import triton_kernel as kernels

CHUNKS = (16, 32, 64, 128)
# Tokens among which keys are compared with one first key of their own, or one by one.
_SEGMENT = 16
# Fewest chunks of a part when the gradients of slots are summed over chunks.
_LEAST_CHUNKS = 8

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Inputs(NamedTuple):
    """The eight inputs of `near_forward`, their last dimensions contiguous."""

    x: Tensor
    query_slots: Tensor
    query_slot_bias: Tensor
    y: Tensor
    y_bias: Tensor
    key_slots: Tensor
    key_slot_bias: Tensor
    value: Tensor

    def checked(self, chunk: int) -> _Inputs:
        """Raises as `near_forward` says."""
        if chunk not in CHUNKS:
            raise InputError(f"chunk must be one of {list(CHUNKS)} for the Triton kernels; got {chunk!r}.")
        if self.x.shape[1] % chunk:
            raise InputError(f"tokens must be a multiple of chunk={chunk}; got {self.x.shape[1]}. Pad the input.")
        check(*self, head_dims=(self.x.shape[-1], self.value.shape[-1]))
        return _Inputs(*(rows(z) for z in self._replace(y_bias=self.y_bias.float().contiguous())))

    def sizes(self) -> tuple[int, ...]:
        """Tokens, slots, and strides in the order in which the kernels take them."""
        return (
            self.x.shape[1],
            self.query_slots.shape[1],
            *self.x.stride()[:2],
            *self.query_slots.stride()[:2],
            self.query_slot_bias.stride(0),
            *self.y.stride()[:2],
            *self.key_slots.stride()[:2],
            self.key_slot_bias.stride(0),
            *self.value.stride()[:2],
        )

    def constants(self, chunk: int, *, backward: bool) -> dict[str, Any]:
        """Block sizes: those of chunks of 64 in dimension 64 were the fastest on an H100 (`scripts/tune_kernels.py`).

        Four warps are twice as fast there as eight. Chunks of 128 tokens spill registers; 64 is the better choice.
        """
        dtype = torch.promote_types(torch.promote_types(self.x.dtype, self.y.dtype), self.value.dtype)
        half = dtype != torch.float32
        widest = 64 if half else 32
        dim, width = self.x.shape[-1], self.value.shape[-1]
        return {
            "DIM": dim,
            "BLOCK_D": min(widest, padded(dim)),
            "WIDTH": width,
            "BLOCK_E": min(widest, padded(width)),
            "CHUNK": chunk,
            "TILE": 16 if backward else 32,
            "SEGMENT": _SEGMENT,
            "DTYPE": _TYPES[dtype],
            "num_warps": 8 if chunk == 128 or (backward and not half) else 4,
            "num_stages": 2 if half else 1,
        }


def near_forward(
    x: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    y: Tensor,
    y_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    value: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Output and log mass of every query.

    Args:
        x, y: `[groups, tokens, dim]`, tokens a multiple of `chunk`. y_bias: `[groups, tokens]`, float32, `-inf` for a
            key that nothing reads.
        query_slots, key_slots: `[groups, slots, dim]`; their biases `[groups, slots]`, float32. Strides may be 0.
        value: `[groups, tokens, head_dim]`.
        chunk: Tokens of a chunk: 16, 32, 64 or 128.
    Returns: `[groups, tokens, head_dim]` in the dtype of `value`, and float32 `[groups, tokens]` (`-inf`, with output
        0, where a query sees nothing).
    Raises: InputError for another chunk or number of tokens; UnsupportedError for tensors that Triton cannot take.
    """
    inputs = _Inputs(x, query_slots, query_slot_bias, y, y_bias, key_slots, key_slot_bias, value)
    inputs = inputs.checked(chunk)
    groups, tokens, _ = x.shape
    output = value.new_empty(groups, tokens, value.shape[-1])
    lse = value.new_empty(groups, tokens, dtype=torch.float32)
    programs = groups * (tokens // chunk)
    constants = inputs.constants(chunk, backward=False)
    launch(kernels.forward, programs, *inputs, output, lse, *inputs.sizes(), **constants)
    return output, lse


def near_backward(
    grad_output: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    y: Tensor,
    y_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    chunk: int,
) -> list[Tensor | None]:
    """Gradients of the eight tensors of `near_forward`, where `needs` says so, by computing the weights again.

    Gradients of slots are those of every group on its own, also where groups share their memory. Where a query sees
    nothing, `grad_mass` is not looked at.
    Raises: as `near_forward`.
    """
    inputs = _Inputs(x, query_slots, query_slot_bias, y, y_bias, key_slots, key_slot_bias, value)
    inputs = inputs.checked(chunk)
    results = [grad_output.to(value.dtype).contiguous(), grad_mass.float().contiguous(), output.contiguous(), lse]
    found: list[Tensor | None] = [None] * 8
    constants = inputs.constants(chunk, backward=True)
    groups, tokens, dim = x.shape
    slots = query_slots.shape[1]
    parts = triton.cdiv(dim, constants["BLOCK_D"])
    if needs[0] or needs[3] or needs[4] or needs[7]:
        grads = [z.new_empty(z.shape) for z in (x, y, y_bias, value)]
        programs = groups * (tokens // chunk) * parts
        launch(kernels.backward_tokens, programs, *inputs, *results, *grads, *inputs.sizes(), **constants)
        for index, grad in zip((0, 3, 4, 7), grads, strict=True):
            found[index] = grad if needs[index] else None
    if needs[1] or needs[2] or needs[5] or needs[6]:
        programs, chunks = groups * triton.cdiv(slots, constants["TILE"]) * parts, tokens // chunk
        pieces = splits(programs, chunks, _LEAST_CHUNKS)
        shapes = [(pieces, *z.shape) for z in (query_slots, query_slot_bias, key_slots, key_slot_bias)]
        grads = [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
        each = triton.cdiv(chunks, pieces)
        launch(
            kernels.backward_slots,
            programs * pieces,
            *inputs,
            *results,
            *grads,
            *inputs.sizes(),
            pieces,
            each,
            **constants,
        )
        for index, grad in zip((1, 2, 5, 6), grads, strict=True):
            found[index] = grad.sum(0).to(inputs[index].dtype) if needs[index] else None
    return found


def _case(dim: int, chunk: int, dtype: torch.dtype) -> None:
    tokens, bias = torch.zeros(1, chunk, dim, dtype=dtype), torch.zeros(1, chunk)
    slots, slot_bias = torch.zeros(1, 256, dim, dtype=dtype), torch.zeros(1, 256)
    inputs = (tokens, slots, slot_bias, tokens, bias, slots, slot_bias, tokens)
    result = near_forward(*inputs, chunk)
    near_backward(*result, *inputs, *result, [True] * 8, chunk)


COMPILE_CASES: CompileCases = {
    "near, bfloat16, chunk 64": lambda: _case(64, 64, torch.bfloat16),
    "near, float16, chunk 32, head_dim 80": lambda: _case(80, 32, torch.float16),
    "near, float32, chunk 32": lambda: _case(64, 32, torch.float32),
}
