"""Causal attention through slots inside chunks: what no state of a slot can hold, because queries see part of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..partial import Partial
from .backend import current_backend, runs_on_triton
from .portable import near as _portable
from .registration import only, register, spread


def near(
    query: Tensor,
    query_bias: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    key: Tensor,
    key_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    value: Tensor,
    chunk: int,
) -> Partial:
    """What every query reads through slots from the keys of its own chunk up to itself.

    Args:
        query, key: `[batch, heads, tokens, dim]`, tokens a multiple of `chunk`; their biases `[batch, heads, tokens]`,
            `-inf` for a key that nothing reads.
        query_slots, key_slots: `[batch or 1, heads, slots, dim]`, or without batch; their biases without `dim`.
        value: `[batch, heads, tokens, head_dim]`.
        chunk: Tokens of a chunk, a power of two.
    Returns: output `[batch, heads, tokens, head_dim]` and its log mass.
    Cost: O(tokens * slots * (head_dim + chunk)) time; memory that of the inputs.
    """
    lead = query.shape[:2]

    def grouped(x: Tensor, ndim: int) -> Tensor:
        x = x.reshape(*[1] * (ndim - x.ndim), *x.shape)
        return x.expand(*lead, *x.shape[2:]).flatten(0, 1)

    output, log_mass = _Near.apply(
        grouped(query, 4),
        grouped(query_bias, 3),
        grouped(query_slots, 4),
        grouped(query_slot_bias, 3),
        grouped(key, 4),
        grouped(key_bias, 3),
        grouped(key_slots, 4),
        grouped(key_slot_bias, 3),
        grouped(value, 4),
        chunk,
        current_backend(),
    )
    return Partial(output.unflatten(0, lead), log_mass.unflatten(0, lead))


class _Near(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _forward_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:9], *output)
        ctx.options = inputs[9:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs, (chunk, backend) = list(ctx.needs_input_grad[:9]), ctx.options
        found = _backward_op(*grads, *ctx.saved_tensors, needs, chunk, backend)
        return *spread(found, needs), None, None


# -- operators -------------------------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> Any:
    *inputs, backend = arguments
    if runs_on_triton(backend, inputs[0]):
        from .triton import near as _triton

        return _triton.near_forward(*inputs)
    return _portable.near_forward(*inputs)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, query_bias, value = arguments[0], arguments[1], arguments[8]
    return value.new_empty(*query.shape[:-1], value.shape[-1]), query_bias.new_empty(query.shape[:-1])


def _backward(*arguments: Any) -> list[Tensor]:
    *inputs, backend = arguments
    if runs_on_triton(backend, inputs[2]):
        from .triton import near as _triton

        return only(tuple(_triton.near_backward(*inputs)))
    return only(tuple(_portable.near_backward(*inputs)))


def _backward_fake(*arguments: Any) -> list[Tensor]:
    return [z.new_empty(z.shape) for z, needed in zip(arguments[2:11], arguments[13], strict=True) if needed]


_TENSORS = (
    "Tensor query, Tensor query_bias, Tensor query_slots, Tensor query_slot_bias, Tensor key, Tensor key_bias,"
    " Tensor key_slots, Tensor key_slot_bias, Tensor value"
)
_forward_op = register(f"near({_TENSORS}, int chunk, str backend) -> (Tensor, Tensor)", _forward, _forward_fake)
_backward_op = register(
    f"near_backward(Tensor grad_output, Tensor grad_mass, {_TENSORS}, Tensor output, Tensor log_mass, bool[] needs,"
    " int chunk, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
