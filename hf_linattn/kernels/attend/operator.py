"""Softmax attention that keeps its log-sum-exp, differentiable in both: the operation all kinds are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..backend import current_backend, runs_on_triton
from ..operators import backward_of, only, register, spread
from . import torch_kernel as _portable


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, visible: Tensor | None = None
) -> AttentionState:
    """Softmax of `query . key + bias` over the keys, applied to `value`, with its log-sum-exp.

    Nothing of size queries x keys is kept, neither for the backward pass nor at any time. Logits and masses are in
    float32 or wider.

    Args:
        query: `[..., queries, dim]`. key: `[..., keys, dim]`. value: `[..., keys, head_dim]`; leading dimensions
            broadcast.
        bias: `[..., keys]`, `-inf` for a key that no query sees.
        visible: Broadcasts to `[..., queries, keys]`; False hides a key from a query.
    """
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    if bias is not None:
        lead = torch.broadcast_shapes(lead, bias.shape[:-1])
        bias = _fold(bias.unsqueeze(-1), lead).squeeze(-1)
    if visible is not None:
        lead = torch.broadcast_shapes(lead, visible.shape[:-2])
    query, key, value = (_fold(z, lead) for z in (query, key, value))
    if visible is not None:
        visible = _fold(visible, lead).expand(-1, -1, query.shape[2], key.shape[2])
    output, lse = _Attend.apply(query, key, value, bias, visible, current_backend())
    return AttentionState(output.reshape(*lead, *output.shape[2:]), lse.reshape(*lead, lse.shape[2]))


def _fold(x: Tensor, lead: torch.Size) -> Tensor:
    """`[..., tokens, dim]` with leading dimensions that broadcast to `lead`, as `[batch, heads, tokens, dim]`.

    Only dimensions that differ are written out: what is shared by all blocks stays one.
    """
    missing = len(lead) - (x.ndim - 2)
    x = x.reshape(*[1] * (missing + max(0, 2 - len(lead))), *x.shape)
    lead = torch.Size([*[1] * max(0, 2 - len(lead)), *lead])
    if len(lead) > 2:
        own = x.shape[:-2]
        # Merge all but the last leading dimension.
        x = x.expand(*lead[:-1], own[-1], *x.shape[-2:]).reshape(-1, own[-1], *x.shape[-2:])
    return x.expand(*([-1] if len(lead) > 2 else [lead[0]]), lead[-1], -1, -1)


class _Attend(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, visible: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        return _forward_op(query, key, value, bias, visible, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5], *output)
        ctx.backend = inputs[5]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs = list(ctx.needs_input_grad[:4])
        found = backward_of(_backward_op, *grads, *ctx.saved_tensors, needs, ctx.backend)
        return *spread(found, needs), None, None


# -- operators -------------------------------------------------------------------------------------------------------


def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Any, visible: Any, backend: str) -> Any:
    if runs_on_triton(backend, query):
        from . import triton_launch as _triton

        return _triton.attend_forward(query, key, value, bias, visible)
    return _portable.attend_forward(query, key, value, bias, visible)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, bias: Any, visible: Any, backend: str) -> Any:
    wide = torch.promote_types(query.dtype, torch.float32)
    return value.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=wide)


def _backward(*arguments: Any) -> list[Tensor]:
    *inputs, backend = arguments
    if runs_on_triton(backend, inputs[2]):
        from . import triton_launch as _triton

        return only(_triton.attend_backward(*inputs))
    return only(_portable.attend_backward(*inputs))


def _backward_fake(*arguments: Any) -> list[Tensor]:
    query, key, value, lse, needs = *arguments[2:5], arguments[8], arguments[9]
    like = [(query, query.shape), (key, key.shape), (value, value.shape), (lse, key.shape[:-1])]
    return [x.new_empty(shape) for (x, shape), needed in zip(like, needs, strict=True) if needed]


_forward_op = register(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? visible, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _Attend,
)
_backward_op = register(
    "attend_backward(Tensor grad_output, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor? bias,"
    " Tensor? visible, Tensor output, Tensor lse, bool[] needs, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
