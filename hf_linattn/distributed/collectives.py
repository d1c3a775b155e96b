"""What the processes that share a sequence exchange, with gradients.

Every exchange takes part in the backward pass, so all processes have to call the same ones in the same order, and each
has to use what it gets (with weight 0 where it is of no use): one whose result enters no output is left out of the
backward pass of that process, and the others wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What has been exchanged: calls by name, and bytes that this process has received."""

    calls: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, received: int) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.received[name] = self.received.get(name, 0) + received


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share a sequence, in the order of its parts.

    Args:
        group: Their process group.
        traffic: Counts what is exchanged, backward passes included.
    """

    group: dist.ProcessGroup
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this one's part, from 0."""
        return dist.get_rank(self.group)

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all processes, `[processes, *x.shape]`. Shapes and dtypes must agree."""
        return _Gather.apply(x, self)

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        return _Reduce.apply(x, self)

    def maximum(self, x: Tensor) -> Tensor:
        """The largest value over processes, elementwise, without gradient."""
        x = x.detach().clone()
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        self.traffic.count("maximum", x.nbytes)
        return x

    def from_left(self, x: Tensor, distance: int = 1) -> Tensor:
        """The tensor from `distance` parts before; zeros where there is none. Shapes and dtypes must agree."""
        return _Neighbour.apply(x, self, -distance)

    def from_right(self, x: Tensor, distance: int = 1) -> Tensor:
        """The tensor from `distance` parts after; zeros where there is none. Shapes and dtypes must agree."""
        return _Neighbour.apply(x, self, distance)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        grad = grad.clone(memory_format=torch.contiguous_format)  # it may be the gradient of something else as well
        # gloo has no reduce_scatter in every release. Groups with a backend for each device have another name.
        if grad.device.type == "cpu" or dist.get_backend(group.group) == "gloo":
            dist.all_reduce(grad, group=group.group)
            own = grad[group.rank]
        else:
            own = torch.empty_like(grad[0])
            dist.reduce_scatter_tensor(own, grad, group=group.group)
        group.traffic.count("gather backward", own.nbytes * group.size)
        return own, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return _sum(x, group, "reduce")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group, "reduce backward"), None


class _Neighbour(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup, side: int) -> Tensor:
        ctx.group, ctx.side = group, side
        return _exchange(x, group, side, "neighbour")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # What came from one side belongs there.
        return _exchange(grad, ctx.group, -ctx.side, "neighbour backward"), None, None


def _all_gather(x: Tensor, group: SequenceGroup) -> Tensor:
    x = x.contiguous()
    parts = x.new_empty(group.size, *x.shape)
    dist.all_gather(list(parts.unbind(0)), x, group=group.group)
    group.traffic.count("gather", parts.nbytes)
    return parts


def _sum(x: Tensor, group: SequenceGroup, name: str) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group.group)
    group.traffic.count(name, x.nbytes)
    return x


def _exchange(x: Tensor, group: SequenceGroup, side: int, name: str) -> Tensor:
    """What the process `side` parts after (negative: before) has; this one's goes the other way."""
    x, found = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
    source, target = group.rank + side, group.rank - side
    exchanges = []
    if 0 <= target < group.size:
        exchanges.append(dist.P2POp(dist.isend, x, group=group.group, group_peer=target))
    if 0 <= source < group.size:
        exchanges.append(dist.P2POp(dist.irecv, found, group=group.group, group_peer=source))
        group.traffic.count(name, found.nbytes)
    for work in dist.batch_isend_irecv(exchanges) if exchanges else []:
        work.wait()
    return found
