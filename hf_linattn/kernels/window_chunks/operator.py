"""Exact attention in a window and to summaries of chunks elsewhere, under one softmax: what EVA computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..attention_state import AttentionState
from ..backend import current_backend, runs_on_triton
from ..operators import backward_of, only, register, spread
from . import torch_kernel as _portable


def window_chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    is_causal: bool,
    chunk_key: Tensor,
    chunk_bias: Tensor,
    chunk_value: Tensor,
    hidden_from: Tensor,
    hidden_to: Tensor,
) -> AttentionState:
    """What queries read from the keys of their window and from all chunks but a range that may depend on the window.

    Args:
        query: `[groups, windows, queries, dim]`.
        key: `[groups, windows, keys, dim]`. value: `[groups, windows, keys, head_dim]`.
        visible: Broadcasts to `[groups, windows, queries, keys]`; False hides a key from a query.
        is_causal: Queries are the last ones of the keys, and see none after them.
        chunk_key: `[groups, chunks, dim]`. chunk_value: `[groups, chunks, head_dim]`.
        chunk_bias: `[groups, chunks]`, `-inf` for a chunk that nothing reads.
        hidden_from, hidden_to: `[windows]` or `[groups, windows]`, integers. Window w does not read the chunks
            `hidden_from[w] <= c < hidden_to[w]`.
    Returns: output `[groups, windows, queries, head_dim]` and its log mass; 0 and `-inf` where nothing is visible.
    Raises: InputError if a causal window has fewer keys than queries.
    Cost: O(queries * (keys + chunks) * head_dim) per window; memory that of inputs and results.
    """
    if is_causal and key.shape[2] < query.shape[2]:
        raise InputError(
            f"A causal window needs at least as many keys as queries; got {key.shape[2]} and {query.shape[2]}."
        )
    groups, windows, length, _ = query.shape
    if visible is not None:
        visible = visible.expand(groups, windows, length, key.shape[2])
    hidden_from, hidden_to = (z.expand(groups, windows) for z in (hidden_from, hidden_to))
    return AttentionState(
        *_WindowsChunks.apply(
            query,
            key,
            value,
            visible,
            chunk_key,
            chunk_bias,
            chunk_value,
            hidden_from,
            hidden_to,
            is_causal,
            current_backend(),
        )
    )


# Those of the nine tensors that have gradients.
_DIFFERENTIABLE = (0, 1, 2, 4, 5, 6)


class _WindowsChunks(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        chunk_key: Tensor,
        chunk_bias: Tensor,
        chunk_value: Tensor,
        hidden_from: Tensor,
        hidden_to: Tensor,
        is_causal: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return _forward_op(
            query, key, value, visible, chunk_key, chunk_bias, chunk_value, hidden_from, hidden_to, is_causal, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:9], *output)
        ctx.options = inputs[9:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        found = spread(backward_of(_backward_op, *grads, *ctx.saved_tensors, needs, *ctx.options), needs)
        return *found[:3], None, *found[3:], None, None, None, None


# -- operators -------------------------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    if runs_on_triton(backend, inputs[0]):
        from . import triton_launch as _triton

        return _triton.window_chunks_forward(*inputs)
    return _portable.window_chunks_forward(*inputs)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, value = arguments[0], arguments[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    return value.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=wide)


def _backward(*arguments: Any) -> list[Tensor]:
    *inputs, backend = arguments
    if runs_on_triton(backend, inputs[2]):
        from . import triton_launch as _triton

        return only(tuple(_triton.window_chunks_backward(*inputs)))
    return only(tuple(_portable.window_chunks_backward(*inputs)))


def _backward_fake(*arguments: Any) -> list[Tensor]:
    inputs, needs = arguments[2:11], arguments[13]
    return [inputs[i].new_empty(inputs[i].shape) for i, needed in zip(_DIFFERENTIABLE, needs, strict=True) if needed]


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? visible, Tensor chunk_key, Tensor chunk_bias, Tensor chunk_value,"
    " Tensor hidden_from, Tensor hidden_to"
)
_forward_op = register(
    f"window_chunks({_TENSORS}, bool is_causal, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _WindowsChunks,
)
_backward_op = register(
    f"window_chunks_backward(Tensor grad_output, Tensor grad_lse, {_TENSORS}, Tensor output, Tensor lse,"
    " bool[] needs, bool is_causal, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
