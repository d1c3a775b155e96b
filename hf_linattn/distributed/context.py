"""What a loop needs whose processes share sequences: layers that attend across them, buffers cut up, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InputError
from ..modules.base import LinearAttention
from ..modules.contract import AttentionInputs
from .collectives import SequenceGroup

# Of gradients that are exchanged at once.
BUCKET_BYTES = 25 * 2**20


def sequence_group(mesh: DeviceMesh) -> SequenceGroup:
    """The processes along a mesh of one dimension. Raises: InputError for anything else."""
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        found = f"dimensions {mesh.mesh_dim_names}" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise InputError(
            f"mesh must be a DeviceMesh of one dimension, that of the processes which share a sequence; got {found}."
            ' Pass the dimension alone: mesh["cp"].'
        )
    return SequenceGroup(mesh.get_group())


@contextmanager
def attending(
    layers: Iterable[LinearAttention[Any]], attend: Callable[[LinearAttention[Any], AttentionInputs], Tensor]
) -> Iterator[None]:
    """Within the block the layers call `attend` in place of their `compute`. Raises: InputError within another one."""
    layers = list(layers)
    if any(layer.sequence_parallel is not None for layer in layers):
        raise InputError(
            "The model's sequences are shared already: a context of another group is open. Close it first."
        )
    try:
        for layer in layers:
            layer.sequence_parallel = attend
        yield
    finally:
        for layer in layers:
            layer.sequence_parallel = None


@contextmanager
def cut_buffers(
    group: SequenceGroup,
    buffers: Sequence[Tensor] | None,
    buffer_seq_dims: Sequence[int] | None,
    no_restore_buffers: set[Tensor] | None,
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within the block each buffer holds this process's part of itself, as in torch's `context_parallel`.

    Args:
        buffers: Changed in place. buffer_seq_dims: The dimension of each that is cut up.
        no_restore_buffers: Those of them that stay as they are after the block.
    Yields: Each buffer, and a copy of it as it was.
    Raises: InputError for arguments that do not fit together, and for a length that cannot be cut into equal parts.
    """
    buffers, dims, kept = list(buffers or ()), list(buffer_seq_dims or ()), set(no_restore_buffers or ())
    if len(buffers) != len(dims):
        raise InputError(
            f"buffer_seq_dims must name a dimension for each buffer; got {len(dims)} for {len(buffers)} buffers."
        )
    if any(all(buffer is not other for other in buffers) for buffer in kept):
        raise InputError("no_restore_buffers must be some of the buffers; got a tensor that is not among them.")
    for buffer, dim in zip(buffers, dims, strict=True):
        if buffer.shape[dim] % group.size:
            raise InputError(
                f"A buffer must have a multiple of {group.size} tokens, one part for each process; got"
                f" {tuple(buffer.shape)} with buffer_seq_dims {dim}. Pad it, or leave buffers out: the model cuts and"
                " pads what it is called with."
            )
    wholes = [(buffer, buffer.detach().clone()) for buffer in buffers]
    try:
        with torch.no_grad():
            for (buffer, whole), dim in zip(wholes, dims, strict=True):
                part = whole.chunk(group.size, dim)[group.rank]
                buffer.resize_(part.shape).copy_(part)
        yield wholes
    finally:
        with torch.no_grad():
            for buffer, whole in wholes:
                if all(buffer is not other for other in kept):
                    buffer.resize_(whole.shape).copy_(whole)


@torch.no_grad()
def reduce_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Replace each gradient by its mean over the processes of a mesh, of one or more dimensions.

    What DistributedDataParallel does by itself. Within `context_parallel` the mean is the gradient of the whole
    sequences; over a further dimension also that of all rows. To be called once, when all losses of a step have gone
    backward. A parameter that has a gradient on one process gets one on all; those that want none are left out.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    used = used.to(parameters[0].device)
    for group in groups:
        dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    parameters = [parameter for parameter, is_used in zip(parameters, used.tolist(), strict=True) if is_used]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets(parameters):
        gradients = [parameter.grad for parameter in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        for group in groups:
            dist.all_reduce(flat, group=group)
        flat /= mesh.size()
        for gradient, values in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(values.view_as(gradient))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[Any]]:
    """Parameters that follow each other and have one dtype and device, together up to about `BUCKET_BYTES`."""
    for _, same in groupby(parameters, key=lambda p: (p.dtype, p.device)):
        bucket: list[Any] = []
        size = 0
        for parameter in same:
            bucket.append(parameter)
            size += parameter.nbytes
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
