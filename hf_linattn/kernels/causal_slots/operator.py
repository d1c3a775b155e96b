"""Causal attention through slots without a window: every query reads all keys up to itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..backend import current_backend, runs_on_triton
from ..operators import backward_of, only, register, spread
from . import torch_kernel as _portable


def causal(
    query: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    key: Tensor,
    key_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    value: Tensor,
    chunk: int,
) -> AttentionState:
    """What every query reads through slots from the keys up to itself.

    Args:
        query, key: `[batch, heads, tokens, dim]`. A factor of the weights that belongs to a query alone only shifts
            its log mass, and is left to the caller.
        key_bias: `[batch or 1, heads or 1, tokens]`, `-inf` for a key that nothing reads.
        query_slots, key_slots: `[batch or 1, heads, slots, dim]`, or without leading dimensions; their biases without
            `dim`.
        value: `[batch, heads, tokens, head_dim]`.
        chunk: Tokens, a power of two, whose keys and queries meet one by one rather than through sums over keys.
    Returns: output `[batch, heads, tokens, head_dim]` and its log mass.
    Cost: O(tokens * slots * (head_dim + chunk)) time; beside inputs and results O(tokens / (16 chunk) * slots *
        head_dim) memory.
    """
    lead = query.shape[:2]

    def grouped(x: Tensor, ndim: int) -> Tensor:
        x = x.reshape(*[1] * (ndim - x.ndim), *x.shape)
        return x.expand(*lead, *x.shape[2:]).flatten(0, 1)

    tensors = (query, query_slots, query_slot_bias, key, key_bias, key_slots, key_slot_bias, value)
    sizes = (4, 4, 3, 4, 3, 4, 3, 4)
    output, lse, *_ = _Causal.apply(
        *(grouped(x, ndim) for x, ndim in zip(tensors, sizes, strict=True)), chunk, current_backend()
    )
    return AttentionState(output.unflatten(0, lead), lse.unflatten(0, lead))


class _Causal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        query_slots: Tensor,
        query_slot_bias: Tensor,
        key: Tensor,
        key_bias: Tensor,
        key_slots: Tensor,
        key_slot_bias: Tensor,
        value: Tensor,
        chunk: int,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return _forward_op(
            query,
            query_slots,
            query_slot_bias,
            key,
            key_bias,
            key_slots,
            key_slot_bias,
            value,
            chunk,
            backend,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:8], *output)
        ctx.mark_non_differentiable(*output[2:])
        ctx.options = inputs[8:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs, (chunk, backend) = list(ctx.needs_input_grad[:8]), ctx.options
        found = backward_of(_backward_op, *grads[:2], *ctx.saved_tensors, needs, chunk, backend)
        return *spread(found, needs), None, None


# -- operators -------------------------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> Any:
    *inputs, backend = arguments
    if runs_on_triton(backend, inputs[0]):
        from . import triton_launch as _triton

        return _triton.causal_forward(*inputs)
    return _portable.causal_forward(*inputs)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    query, key_bias, slots, value, chunk = arguments[0], arguments[4], arguments[5], arguments[7], arguments[8]
    kept = _portable.kept_states(query.shape[1], chunk)
    sums = key_bias.new_empty(query.shape[0], kept, slots.shape[1], value.shape[-1])
    masses = key_bias.new_empty(query.shape[0], kept, slots.shape[1], 2)
    output = value.new_empty(*query.shape[:-1], value.shape[-1])
    return output, key_bias.new_empty(query.shape[:-1]), sums, masses


def _backward(*arguments: Any) -> list[Tensor]:
    *inputs, backend = arguments
    if runs_on_triton(backend, inputs[2]):
        from . import triton_launch as _triton

        return only(tuple(_triton.causal_backward(*inputs)))
    return only(tuple(_portable.causal_backward(*inputs)))


def _backward_fake(*arguments: Any) -> list[Tensor]:
    return [z.new_empty(z.shape) for z, needed in zip(arguments[2:10], arguments[14], strict=True) if needed]


_TENSORS = (
    "Tensor query, Tensor query_slots, Tensor query_slot_bias, Tensor key, Tensor key_bias, Tensor key_slots,"
    " Tensor key_slot_bias, Tensor value"
)
_forward_op = register(
    f"causal({_TENSORS}, int chunk, str backend) -> (Tensor, Tensor, Tensor, Tensor)", _forward, _forward_fake, _Causal
)
_backward_op = register(
    f"causal_backward(Tensor grad_output, Tensor grad_lse, {_TENSORS}, Tensor output, Tensor lse, Tensor sums,"
    " Tensor masses, bool[] needs, int chunk, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
