"""A model in one process, under DDP and under FSDP2, and the same steps of training in each."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hf_linattn.distributed.fully_sharded import whole
from hf_linattn.distributed.tensor_parallel import split_heads
from hf_linattn.modules.base import LinearAttention
from hf_linattn.training import redraw_projections, shard_linear_attention

PLANS: dict[str, dict[str, Any]] = {
    "BertLayer": {
        "attention.self.query": ColwiseParallel(),
        "attention.self.key": ColwiseParallel(),
        "attention.self.value": ColwiseParallel(),
        "attention.output.dense": RowwiseParallel(),
        "intermediate.dense": ColwiseParallel(),
        "output.dense": RowwiseParallel(),
    },
    "ViTLayer": {
        "attention.q_proj": ColwiseParallel(),
        "attention.k_proj": ColwiseParallel(),
        "attention.v_proj": ColwiseParallel(),
        "attention.o_proj": RowwiseParallel(),
    },
}
LAYERS = ("BertLayer", "GPT2Block", "ViTLayer")
ROWS = 8


def share(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a batch that are this process's."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return {name: tensor.tensor_split(size)[rank] for name, tensor in batch.items()}


def without_dropout(model: Any) -> Any:
    """The model in train mode, whose passes are the same all the same."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def layers_of(model: nn.Module) -> list[LinearAttention[Any]]:
    return [module for module in model.modules() if isinstance(module, LinearAttention)]


def shard(model: Any, *, param_dtype: torch.dtype | None = None, maps: bool = True, mesh: Any = None) -> Any:
    """FSDP2 as a script of its own would use it; `maps`: learned maps are units."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype)}
    if maps:
        assert shard_linear_attention(model, mesh=mesh) == sum(bool(list(z.parameters())) for z in layers_of(model))
    blocks = [module for module in model.modules() if type(module).__name__ in LAYERS]
    for module in (*blocks, model):
        fully_shard(module, **options)
        assert isinstance(module, FSDPModule)
    assert len(blocks) == 2
    return model


def split(model: Any, *, heads: bool = True, mesh: Any = None) -> Any:
    """Tensor parallelism; `heads`: linear attention follows."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    if heads:
        assert split_heads(model, mesh) == 2
    for layer in [module for module in model.modules() if type(module).__name__ in PLANS]:
        parallelize_module(layer, mesh, PLANS[type(layer).__name__])
    return model


def wrapped(model: Any, strategy: str) -> Any:
    if strategy == "ddp":
        return DistributedDataParallel(model)
    return shard(model) if strategy == "fsdp2" else model


def loss_of(output: Any) -> Tensor:
    """A mean over rows, as a batch of any number of processes has it."""
    logits: Tensor = output[0]
    return logits.float().square().mean()


def train(
    model: Any, strategy: str, batches: list[dict[str, Tensor]], learning_rate: float = 0.02
) -> dict[str, Tensor]:
    """Steps on batches, of which each process has its rows. Returns the losses, and all tensors after them."""
    is_one = strategy == "one"
    model = without_dropout(model)
    redraw_projections(model, 0)
    net = wrapped(model, strategy)
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    losses = []
    for step, batch in enumerate(batches):
        loss = loss_of(net(**(batch if is_one else share(batch))))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        redraw_projections(net, step + 1)
        loss = loss.detach().clone()
        if not is_one:
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        losses.append(loss)
    return {"losses": torch.stack(losses), **whole_tensors(model)}


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, gathered; tied ones once."""
    with contextlib.suppress(AttributeError):
        model.reshard()  # type: ignore[operator]
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: whole(tensor.detach()) for name, tensor in found.items()}
