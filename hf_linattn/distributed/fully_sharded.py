"""FSDP2: what linear attention learns stays in the dtype it is kept in, while weights are gathered in bfloat16.

`fully_shard` rounds all parameters of a unit to the dtype of its `MixedPrecisionPolicy`. Learned maps are exponents of
slots, whose rounding shows; they are few, so a unit of their own, without that rounding, costs one small exchange a
layer. Buffers are neither sharded nor rounded by FSDP2.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..modules.base import LinearAttention


def shard_linear_attention(model: nn.Module, **options: Any) -> int:
    """Make a unit of FSDP2 of every linear attention that learns something, whose parameters are not rounded.

    Call it before `fully_shard` of the layers and of the model, which leave out what is sharded already::

        shard_linear_attention(model, mesh=mesh)
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))

    Where Accelerate shards the model, name the class of the linear attention among the classes to wrap instead, and
    let `LinAttnCallback` do the rest (docs/clusters.md).

    Args:
        options: Of `torch.distributed.fsdp.fully_shard`, but `mp_policy`: the mesh, if it is not the whole world.
    Returns: The number of units.
    Raises: UnsupportedError if the model is sharded already.
    """
    from torch.distributed.fsdp import fully_shard

    if "mp_policy" in options:
        raise UnsupportedError("shard_linear_attention has a mp_policy of its own: without rounding. Leave it out.")
    if is_sharded(model):
        raise UnsupportedError("The model is sharded already: call shard_linear_attention before any fully_shard.")
    layers = [module for module in model.modules() if isinstance(module, LinearAttention) and _learns(module)]
    for layer in layers:
        fully_shard(layer, mp_policy=_as_kept(), **options)
    return len(layers)


def keep_precision(model: nn.Module) -> list[LinearAttention[Any]]:
    """Take the rounding off units of FSDP2 that are linear attention, before their first forward pass.

    For units that somebody else has made with one policy for all: Accelerate.

    Returns: The layers that are no unit and whose parameters are sharded with others, rounded as these are.
    """
    if not is_sharded(model):
        return []
    mixed = []
    for layer in _layers(model):
        if not is_unit(layer):
            mixed += [layer] if any(map(is_part, layer.parameters())) else []
            continue
        unit: Any = layer
        state = unit._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # one before torch 2.13
        groups = [group for group in groups if group is not None]  # none for a layer that learns nothing
        if not hasattr(state, "_mp_policy") or not all(hasattr(group, "mp_policy") for group in groups):
            raise UnsupportedError(
                "This release of torch keeps the precision of FSDP2 elsewhere, so that learned maps would be rounded."
                " Train without mixed precision (bf16=False), or with DDP."
            )
        state._mp_policy = _as_kept()
        for group in groups:
            group.mp_policy = _as_kept()
        kept = {name: parameter.dtype for name, parameter in layer.named_parameters()}
        layer.register_forward_pre_hook(functools.partial(_check_dtypes, kept))
    return mixed


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that what is registered is what FSDP2 keeps: values set in a copy would be lost."""
    for module in model.modules() if is_sharded(model) else ():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


@contextlib.contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Within the block a unit has its whole parameters, outside of a forward pass too. Values set there are lost."""
    if not is_unit(layer):
        yield
        return
    layer.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        layer.reshard()  # type: ignore[operator]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards some part of a model."""
    return _unit_class() is not None and any(map(is_unit, model.modules()))


def is_unit(module: nn.Module) -> bool:
    """Whether a module is gathered by itself."""
    unit = _unit_class()
    return unit is not None and isinstance(module, unit)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is sharded. All processes have to call it."""
    return tensor.full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def copy_learned(source: nn.Module, target: nn.Module) -> None:
    """Give linear attention of one model what that of another has learned. All processes have to call it.

    Args:
        source: Sharded, or as it is.
        target: The same model, whole.
    """
    reshard(source)
    for one, other in zip(_layers(source), _layers(target), strict=True):
        other.set_tensors({name: whole(parameter) for name, parameter in one.named_parameters()})


def whole_state(state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """A state dict with whole tensors, on the CPU; names that share a tensor still do.

    Args:
        keep: Whether this process keeps them. All have to call it.
    """
    found: dict[Any, Tensor] = {}
    for tensor in state.values():
        place = _storage(tensor)
        if place not in found:
            value = whole(tensor.detach())
            found[place] = value.cpu() if keep else value.new_empty(0)
    return {name: found[_storage(tensor)] for name, tensor in state.items()}


def _storage(tensor: Any) -> Any:
    """What two names of one tensor have in common."""
    local = tensor.to_local() if is_part(tensor) else tensor
    return local.untyped_storage()._cdata, local.storage_offset(), local.shape


def _layers(model: nn.Module) -> Iterator[LinearAttention[Any]]:
    yield from (module for module in model.modules() if isinstance(module, LinearAttention))


def _learns(layer: nn.Module) -> bool:
    return any(True for _ in layer.parameters())


def has_parts(module: nn.Module) -> bool:
    """Whether a parameter of a module is this process's part of one; False without processes."""
    is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return not is_alone and any(map(is_part, module.parameters()))


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is this process's part of one (a DTensor)."""
    return hasattr(tensor, "full_tensor")  # without the import


def _unit_class() -> Any:
    """What FSDP2 makes of a module; None where nothing has imported it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def _as_kept() -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=None, reduce_dtype=None, output_dtype=None, cast_forward_inputs=False)


def _check_dtypes(kept: dict[str, torch.dtype], layer: Any, _: Any) -> None:
    """Raise if a layer is given rounded parameters all the same."""
    rounded = {name: p.dtype for name, p in layer.named_parameters() if p.dtype != kept.get(name, p.dtype)}
    if rounded:
        raise UnsupportedError(
            f"FSDP2 rounds what layer {layer.shape.layer_idx} has learned: {rounded}. Train without mixed precision"
            " (bf16=False), or with DDP."
        )
