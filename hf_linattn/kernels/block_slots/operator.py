"""Blocks of queries that read other blocks of keys through slots: the states of units, their scan, and the read-out.

States of all units are as large as `units * slots` keys. They are never kept: they are computed again in the backward
pass, and for some rows and heads at a time, so that they stay small.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..backend import current_backend, runs_on_triton
from ..operators import backward_of, only, register, spread
from . import torch_all as portable
from .reach import BlockReach

# Elements of the states that are computed at a time (at least one row and head).
_STATES = {"cpu": 1 << 22}
_MORE_STATES = 1 << 29


def inter_block_attention(
    query: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    key: Tensor,
    key_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    value: Tensor,
    reach: BlockReach,
) -> AttentionState:
    """What every query reads through slots from the units of keys that its block reaches.

    Args:
        query: `[batch, heads, blocks, queries, dim]`.
        query_slots, key_slots: `[batch or 1, heads, slots, dim]`; their biases `[batch or 1, heads, slots]`.
        key: `[batch, heads, units, keys, dim]`. value: `[batch, heads, units, keys, head_dim]`.
        key_bias: `[batch or 1, heads or 1, units, keys]`, `-inf` for a key that nothing reads.
        reach: Which units a block reads.
    Returns: output `[batch, heads, blocks, queries, head_dim]` and its log mass.
    Cost: O((queries + keys) * slots * head_dim) time, and for each row and head at a time O(units * slots * head_dim)
        memory.
    """
    lead = query.shape[:2]

    def grouped(x: Tensor, missing: int = 0) -> Tensor:
        x = x.reshape(*[1] * missing, *x.shape)
        return x.expand(*lead, *x.shape[2:]).reshape(-1, *x.shape[2:])

    no_lead = 4 - query_slots.ndim
    output, lse = _Blocks.apply(
        grouped(query),
        grouped(query_slots, no_lead),
        grouped(query_slot_bias, no_lead),
        grouped(key),
        grouped(key_bias),
        grouped(key_slots, no_lead),
        grouped(key_slot_bias, no_lead),
        grouped(value),
        [reach.units, reach.margin, int(reach.is_causal)],
        current_backend(),
    )
    return AttentionState(output.unflatten(0, lead), lse.unflatten(0, lead))


class _Blocks(torch.autograd.Function):
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
        reach: list[int],
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return _forward_op(
            query, query_slots, query_slot_bias, key, key_bias, key_slots, key_slot_bias, value, reach, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:8], *output)
        ctx.options = inputs[8:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs, (reach, backend) = list(ctx.needs_input_grad[:8]), ctx.options
        found = backward_of(_backward_op, *grads, *ctx.saved_tensors, needs, reach, backend)
        return *spread(found, needs), None, None


# -- operators -------------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """The tensor arguments of `inter_block_attention`, with rows and heads as one dimension of groups."""

    query: Tensor
    query_slots: Tensor
    query_slot_bias: Tensor
    key: Tensor
    key_bias: Tensor
    key_slots: Tensor
    key_slot_bias: Tensor
    value: Tensor

    def some(self) -> Iterator[tuple[slice, _Inputs]]:
        """A few groups at a time."""
        per_group = self.key.shape[1] * self.key_slots.shape[1] * self.value.shape[-1]
        step = max(1, _STATES.get(self.key.device.type, _MORE_STATES) // per_group)
        for start in range(0, self.key.shape[0], step):
            part = slice(start, start + step)
            yield part, _Inputs(*(z[part] for z in self))

    def states(self, kernels: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
        """Output and log mass of every unit, and the log mass without the bias of the slots."""
        slots = self.key_slots.unsqueeze(1).expand(-1, self.key.shape[1], -1, -1)
        output, mass = kernels.attend_forward(slots, self.key, self.value, self.key_bias, None)
        return output, mass + self.key_slot_bias.unsqueeze(1), mass

    def reading(self) -> tuple[Tensor, Tensor]:
        """Slots as keys of the queries: `[groups, blocks, slots, dim]` and their bias `[groups, 1, slots]`."""
        slots = self.query_slots.unsqueeze(1).expand(-1, self.query.shape[1], -1, -1)
        return slots, self.query_slot_bias.unsqueeze(1)


def _kernels(backend: str, tensor: Tensor) -> ModuleType:
    if runs_on_triton(backend, tensor):
        from . import triton_all as kernels

        return kernels
    return portable


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, options, backend = arguments
    inputs, reach = _Inputs(*tensors), BlockReach(options[0], options[1], bool(options[2]))
    kernels = _kernels(backend, inputs.query)
    output = inputs.value.new_empty(*inputs.query.shape[:-1], inputs.value.shape[-1])
    lse = inputs.key_bias.new_empty(inputs.query.shape[:-1])
    for part, few in inputs.some():
        states, mass, _ = few.states(kernels)
        merged, merged_mass = kernels.scan_forward(states, mass, few.query.shape[1], reach)
        slots, bias = few.reading()
        output[part], lse[part] = kernels.attend_forward(few.query, slots, merged, merged_mass + bias, None)
    return output, lse


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(*arguments[:8])
    shape = inputs.query.shape[:-1]
    return inputs.value.new_empty(*shape, inputs.value.shape[-1]), inputs.key_bias.new_empty(shape)


def _backward(*arguments: Any) -> list[Tensor]:
    grad_output, grad_mass, *tensors, output, lse, needs, options, backend = arguments
    inputs, reach = _Inputs(*tensors), BlockReach(options[0], options[1], bool(options[2]))
    kernels = _kernels(backend, inputs.query)
    found: list[Tensor | None] = [z.new_empty(z.shape) if n else None for z, n in zip(inputs, needs, strict=True)]
    for part, few in inputs.some():
        few_found = _backward_of(
            few, grad_output[part], grad_mass[part], output[part], lse[part], needs, reach, kernels
        )
        for total, grad in zip(found, few_found, strict=True):
            if total is not None and grad is not None:
                total[part] = grad
    return only(tuple(found))


def _backward_of(
    few: _Inputs,
    grad_output: Tensor,
    grad_mass: Tensor,
    output: Tensor,
    lse: Tensor,
    needs: list[bool],
    reach: BlockReach,
    kernels: ModuleType,
) -> list[Tensor | None]:
    states, mass, plain_mass = few.states(kernels)
    merged, merged_mass = kernels.scan_forward(states, mass, few.query.shape[1], reach)
    slots, bias = few.reading()
    key_side = any(needs[3:])
    query, query_slots, grad_merged, grad_bias = kernels.attend_backward(
        grad_output,
        grad_mass,
        few.query,
        slots,
        merged,
        merged_mass + bias,
        None,
        output,
        lse,
        [needs[0], needs[1], key_side, key_side or needs[2]],
    )
    found = [query, None if query_slots is None else query_slots.sum(1), grad_bias.sum(1) if needs[2] else None]
    if not key_side:
        return [*found, None, None, None, None, None]
    grad_states, grad_state_mass = kernels.scan_backward(
        grad_merged, grad_bias, states, mass, merged, merged_mass, reach
    )
    del merged, grad_merged
    slots = few.key_slots.unsqueeze(1).expand(-1, few.key.shape[1], -1, -1)
    key_slots, key, value, key_bias = kernels.attend_backward(
        grad_states,
        grad_state_mass,
        slots,
        few.key,
        few.value,
        few.key_bias,
        None,
        states,
        plain_mass,
        [needs[5], needs[3], needs[7], needs[4]],
    )
    slot_bias = grad_state_mass.sum(1) if needs[6] else None
    return [*found, key, key_bias, None if key_slots is None else key_slots.sum(1), slot_bias, value]


def _backward_fake(*arguments: Any) -> list[Tensor]:
    return [z.new_empty(z.shape) for z, needed in zip(arguments[2:10], arguments[12], strict=True) if needed]


_TENSORS = (
    "Tensor query, Tensor query_slots, Tensor query_slot_bias, Tensor key, Tensor key_bias, Tensor key_slots,"
    " Tensor key_slot_bias, Tensor value"
)
_forward_op = register(
    f"blocks({_TENSORS}, int[] reach, str backend) -> (Tensor, Tensor)", _forward, _forward_fake, _Blocks
)
_backward_op = register(
    f"blocks_backward(Tensor grad_output, Tensor grad_lse, {_TENSORS}, Tensor output, Tensor lse, bool[] needs,"
    " int[] reach, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)
