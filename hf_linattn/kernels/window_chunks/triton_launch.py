"""Exact attention in a window and to summaries of chunks elsewhere, under one softmax, in Triton.

One program reads the keys of its window and then the chunks, so that the two parts are merged in registers; tiles of
chunks that a window does not read cost nothing. No atomic additions: two runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..attention_state import AttentionState
from ..triton_common import CompileCases, check, launch, padded, rows, splits
from . import triton_kernel as kernels
from .torch_kernel import WindowChunkInputs

# (queries, keys or chunks) of a tile by bytes per element and widest padded dimension. Those of 64 were the fastest on
# an H100 (`scripts/tune_kernels.py`) of what fits into the shared memory and registers of sm_80; the others fit there.
_FORWARD = {
    (2, 64): (64, 64),
    (2, 128): (64, 64),
    (2, 256): (64, 32),
    (4, 64): (64, 32),
    (4, 128): (32, 32),
    (4, 256): (16, 16),
}
_BACKWARD = {
    (2, 64): (64, 64),
    (2, 128): (64, 32),
    (2, 256): (32, 32),
    (4, 64): (32, 32),
    (4, 128): (32, 16),
    (4, 256): (16, 16),
}
# Fewest windows of a part when the gradients of chunks are summed over windows.
_LEAST_WINDOWS = 8


def _ready(inputs: WindowChunkInputs) -> WindowChunkInputs:
    """One dtype for queries and keys and one for values, strides that the kernels can take. Raises: as `check`."""
    query, key, value, visible, chunk_key, chunk_bias, chunk_value, *hidden = inputs
    check(query, key, value, visible, chunk_key, chunk_value, head_dims=(query.shape[-1], value.shape[-1]))
    dim_type = torch.promote_types(torch.promote_types(query.dtype, key.dtype), chunk_key.dtype)
    value_type = torch.promote_types(value.dtype, chunk_value.dtype)
    groups, windows, length, _ = query.shape
    return WindowChunkInputs(
        rows(query.to(dim_type)),
        rows(key.to(dim_type)),
        rows(value.to(value_type)),
        None if visible is None else visible.expand(groups, windows, length, key.shape[2]),
        chunk_key.to(dim_type).contiguous(),
        chunk_bias.float().contiguous(),
        chunk_value.to(value_type).contiguous(),
        *(z.expand(groups, windows).int().contiguous() for z in hidden),
    )


def _sizes(inputs: WindowChunkInputs) -> tuple[int, ...]:
    _, windows, length, _ = inputs.query.shape
    return windows, length, inputs.key.shape[2], inputs.chunk_key.shape[1]


def _strides(inputs: WindowChunkInputs) -> tuple[int, ...]:
    query, key, value, visible = inputs[:4]
    of_visible = (0, 0, 0, 0) if visible is None else visible.stride()
    return *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *of_visible


def _constants(
    inputs: WindowChunkInputs, table: dict[tuple[int, int], tuple[int, int]], queries: int, keys: int
) -> dict[str, Any]:
    """Dimensions and block sizes, made smaller where there are fewer queries or keys."""
    dim, width = inputs.query.shape[-1], inputs.value.shape[-1]
    size = max(inputs.query.element_size(), inputs.value.element_size())
    block_q, block_k = table[size, max(64, padded(dim), padded(width))]
    return {
        "DIM": dim,
        "DIM_P": padded(dim),
        "WIDTH": width,
        "WIDTH_P": padded(width),
        "BLOCK_Q": min(block_q, padded(queries)),
        "BLOCK_K": min(block_k, padded(keys)),
        "num_warps": 8 if max(padded(dim), padded(width)) > 64 else 4,
        "num_stages": 2 if size == 2 else 1,
    }


def window_chunks_forward(inputs: WindowChunkInputs, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Output `[groups, windows, queries, head_dim]` and log-sum-exp, as `window_chunk_attention` describes them.

    Raises: UnsupportedError for tensors that Triton cannot take.
    """
    query, value = inputs.query, inputs.value
    inputs = _ready(inputs)
    groups, windows, length, _ = query.shape
    output = value.new_empty(groups, windows, length, value.shape[-1])
    lse = output.new_empty(groups, windows, length, dtype=torch.float32)
    sizes = _sizes(inputs)
    constants = _constants(inputs, _FORWARD, length, max(sizes[2:]))
    launch(
        kernels.of_queries,
        groups * windows * triton.cdiv(length, constants["BLOCK_Q"]),
        *(*inputs, None, None, lse, output, *sizes, *_strides(inputs)),
        BACKWARD=False,
        MASK=inputs.visible is not None,
        CAUSAL=is_causal,
        **constants,
    )
    return output, lse


def window_chunks_backward(
    grads: AttentionState,
    inputs: WindowChunkInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    is_causal: bool,
) -> list[Tensor | None]:
    """Gradients of query, key, value, chunk_key, chunk_bias and chunk_value, where `needs` says so.

    Gradients of rows that see nothing are not looked at. Raises: as `window_chunks_forward`.
    """
    (grad_output, grad_lse), (output, lse), given = grads, results, inputs
    query, key, value = given[:3]
    inputs = _ready(given)
    groups, windows, length, _ = query.shape
    keys, chunks = key.shape[2], inputs.chunk_key.shape[1]
    shift = (grad_output.float() * output.float()).sum(-1) - grad_lse
    shift = shift.masked_fill(lse == float("-inf"), 0.0)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    upstream = grad_output.to(inputs.value.dtype).contiguous(), shift.contiguous(), lse.contiguous()
    sizes, strides = _sizes(inputs), _strides(inputs)
    flags = {"MASK": inputs.visible is not None, "CAUSAL": is_causal}
    found: list[Tensor | None] = [None] * 6
    if needs[0]:
        found[0] = query.new_empty(query.shape)
        constants = _constants(inputs, _BACKWARD, length, max(keys, chunks))
        programs = groups * windows * triton.cdiv(length, constants["BLOCK_Q"])
        arguments = (*inputs, *upstream, found[0], *sizes, *strides)
        launch(kernels.of_queries, programs, *arguments, BACKWARD=True, **flags, **constants)
    if needs[1] or needs[2]:
        of_keys = key.new_empty(key.shape), value.new_empty(value.shape)
        constants = _constants(inputs, _BACKWARD, length, keys)
        programs = groups * windows * triton.cdiv(keys, constants["BLOCK_K"])
        arguments = (*inputs[:4], *upstream, *of_keys, *sizes[:3], *strides)
        launch(kernels.of_keys, programs, *arguments, **flags, **constants)
        found[1:3] = [grad if needed else None for grad, needed in zip(of_keys, needs[1:3], strict=True)]
    if needs[3] or needs[4] or needs[5]:
        constants = _constants(inputs, _BACKWARD, length, chunks)
        programs = groups * triton.cdiv(chunks, constants["BLOCK_K"])
        parts = splits(programs, windows, _LEAST_WINDOWS)
        of_chunks = [inputs.chunk_bias.new_empty(parts, *z.shape, dtype=torch.float32) for z in inputs[4:7]]
        of_parts = (windows, length, chunks, *inputs.query.stride()[:3], parts, triton.cdiv(windows, parts))
        arguments = (inputs.query, *inputs[4:], *upstream, *of_chunks, *of_parts)
        launch(kernels.of_chunks, programs * parts, *arguments, **constants)
        for i, (grad, like) in enumerate(zip(of_chunks, given[4:7], strict=True), start=3):
            found[i] = grad.sum(0).to(like.dtype) if needs[i] else None
    return found


def _case(dim: int, dtype: torch.dtype, *, masked: bool) -> None:
    query, key = torch.zeros(1, 2, 64, dim, dtype=dtype), torch.zeros(1, 2, 128, dim, dtype=dtype)
    visible = torch.ones(1, 2, 1, 128, dtype=torch.bool) if masked else None
    chunk, bias = torch.zeros(1, 64, dim, dtype=dtype), torch.zeros(1, 64)
    hidden = torch.zeros(2, dtype=torch.int32)
    inputs = WindowChunkInputs(query, key, key, visible, chunk, bias, chunk, hidden, hidden)
    result = AttentionState(*window_chunks_forward(inputs, not masked))
    window_chunks_backward(result, inputs, result, [True] * 6, not masked)


COMPILE_CASES: CompileCases = {
    "windows and chunks, bfloat16, causal": lambda: _case(64, torch.bfloat16, masked=False),
    "windows and chunks, bfloat16, masked": lambda: _case(64, torch.bfloat16, masked=True),
    "windows and chunks, float16, head_dim 80": lambda: _case(80, torch.float16, masked=True),
    "windows and chunks, float32": lambda: _case(64, torch.float32, masked=True),
    "windows and chunks, float32, head_dim 256": lambda: _case(256, torch.float32, masked=False),
    "windows and chunks, bfloat16, head_dim 256": lambda: _case(256, torch.bfloat16, masked=False),
}
