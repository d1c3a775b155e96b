"""Tensor parallelism: each process attends with some of the heads, as the projections before and after it are split.

Everything that linear attention has is per head, so a process needs nothing of the others while it attends. Tensors
stay whole on every process, which takes the slice of its heads when it computes: they are small beside the projections
of queries, keys and values, and a saved model needs no gathering of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedError
from ..modules.base import LinearAttention


def split_heads(model: nn.Module, mesh: Any) -> int:
    """Let linear attention follow heads that are split over processes.

    The processes of `mesh` have neighbouring heads, in its order, as `ColwiseParallel` of the projections of queries,
    keys and values leaves them. Call it before or after the projections are split, on all processes::

        mesh = init_device_mesh("cuda", (2,))
        split_heads(model, mesh)
        for layer in model.bert.encoder.layer:
            parallelize_module(layer.attention, mesh, {
                "self.query": ColwiseParallel(), "self.key": ColwiseParallel(), "self.value": ColwiseParallel(),
                "output.dense": RowwiseParallel(),
            })

    Gradients of learned maps are gathered: they are those of all heads on every process. Calibration, attention
    transfer and `compare` look at whole layers and come before.

    Args:
        mesh: A `DeviceMesh` of one dimension.
    Returns: The number of layers.
    Raises: ConfigError for a model without linear attention, for heads that cannot be split evenly, and for a mesh of
        several dimensions; UnsupportedError for a model whose queries, keys and values come from one projection
        (GPT-2).
    """
    if mesh.ndim != 1:
        raise ConfigError(
            f"mesh must have one dimension, that of the heads; got {mesh}. Pass mesh['tp'], or its name."
        )
    layers = [(module, layer) for module in model.modules() for layer in _held(module)]
    if not layers:
        raise ConfigError(
            "The model has no linear attention to split. Convert it first; adapters (PEFT) come off before."
        )
    for module, layer in layers:
        heads = layer.shape.num_heads
        if heads % mesh.size():
            raise ConfigError(
                f"The {heads} heads of {type(module).__name__} do not go evenly into {mesh.size()} processes."
            )
        if hasattr(module, "c_attn"):
            raise UnsupportedError(
                f"{type(module).__name__} makes queries, keys and values in one projection (c_attn), which tensor"
                " parallelism does not split by heads. Use DDP, FSDP2 or DeepSpeed (docs/clusters.md)."
            )
    for _, layer in layers:
        layer.local_heads = LocalHeads.of(layer, mesh)
        layer.num_local_heads = layer.shape.num_heads // mesh.size()
    return len(layers)


@dataclass(frozen=True)
class LocalHeads:
    """Takes the slice of a process's heads out of the tensors of a layer.

    Args:
        axes: Which axis of a tensor is that of the heads, by the tensor's name; not of those without one.
        group: The processes that share the heads.
        rank: The number of this one among them.
        size: How many there are.
    """

    axes: Mapping[str, int]
    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, layer: LinearAttention[Any], mesh: Any) -> LocalHeads:
        fewer = layer.state_spec(layer.config, replace(layer.shape, num_heads=layer.shape.num_heads // mesh.size()))
        axes = {
            name: axis
            for name, tensor in layer.state_spec(layer.config, layer.shape).items()
            for axis, (all_heads, some) in enumerate(zip(tensor.shape, fewer[name].shape, strict=True))
            if all_heads != some
        }
        return cls(axes, mesh.get_group(), mesh.get_local_rank(), mesh.size())

    def __deepcopy__(self, memo: Any) -> LocalHeads:
        return self  # a copy of the model belongs to the same processes, whose group cannot be copied

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._own(name, tensor) if name in self.axes else tensor for name, tensor in tensors.items()}

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        found: Tensor = _Own.apply(tensor, self.axes[name], self)
        return found


class _Own(torch.autograd.Function):
    """A slice, whose gradient is put together from those of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, heads: LocalHeads) -> Tensor:
        ctx.axis, ctx.heads = axis, heads
        return x.chunk(heads.size, axis)[heads.rank].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous()
        parts = [torch.empty_like(grad) for _ in range(ctx.heads.size)]
        dist.all_gather(parts, grad, group=ctx.heads.group)
        return torch.cat(parts, ctx.axis), None, None


def _held(module: nn.Module) -> list[LinearAttention[Any]]:
    """The linear attention that a module holds itself."""
    return [child for child in module.children() if isinstance(child, LinearAttention)]
