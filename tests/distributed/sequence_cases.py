"""Layers and inputs for tests of shared sequences, and what one process makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_linattn.distributed.collectives import SequenceGroup
from hf_linattn.distributed.layers import attend_across
from hf_linattn.modules.base import LinearAttention
from hf_linattn.modules.contract import AttentionInputs, LayerShape
from hf_linattn.modules.registry import get_kind
from tests.helpers import random

HEADS, DIM = 2, 4


@dataclass(frozen=True)
class Case:
    """A layer, and a batch of rows of which every process has `length` places.

    Args:
        lengths: Real tokens of every row; `None` for no mask.
        dtype: Of tokens and learned tensors.
    """

    kind: str
    is_causal: bool
    length: int
    lengths: tuple[int, ...] | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def layer(self) -> LinearAttention[Any]:
        """In training, calibrated, with learned tensors off their first values."""
        record = get_kind(self.kind)
        config = record.config_cls(**{"num_global_tokens": 0, "seed": 3, **self.settings})
        layer = record.module_cls(config, LayerShape(HEADS, DIM, 1, self.is_causal))
        calibration = layer.new_calibration()
        if calibration is not None:
            query, key, value = (random(2, HEADS, 24, DIM, seed=90 + i) for i in range(3))
            calibration.update(AttentionInputs(query, key, value, None, DIM**-0.5, self.is_causal))
            layer.set_tensors(calibration.result())
        layer = layer.to(self.dtype)
        with torch.no_grad():
            for number, parameter in enumerate(layer.parameters()):
                parameter += random(*parameter.shape, seed=50 + number, scale=0.3).to(parameter)
        return layer.train()

    def tensors(self, processes: int) -> tuple[list[Tensor], Tensor | None]:
        """Query, key, value and a gradient of the output, for all processes together; the mask."""
        tokens, rows = processes * self.length, len(self.lengths or (0, 0))
        found = [random(rows, HEADS, tokens, DIM, seed=7 * i + tokens, scale=1.2).to(self.dtype) for i in range(4)]
        if self.lengths is None:
            return found, None
        mask = torch.arange(tokens) < torch.tensor(self.lengths)[:, None]
        padding = ~mask[:, None, :, None]
        # Whatever stands in the padding must reach nothing.
        found = [*(z.masked_fill(padding, float("inf")) for z in found[:3]), found[3].masked_fill(padding, 0.0)]
        return found, mask

    def expected(self, processes: int) -> dict[str, Tensor]:
        """Output and gradients of one process that has all tokens."""
        (query, key, value, grad), mask = self.tensors(processes)
        return results(self.layer(), [query, key, value], mask, grad)

    def shared(self, group: SequenceGroup) -> dict[str, Any]:
        """The same of this process's part, and bytes received: in the forward pass, and in the backward pass too."""
        layer, (tensors, mask) = self.layer(), self.tensors(group.size)
        start, stop = group.rank * self.length, (group.rank + 1) * self.length
        *tokens, grad = (z[:, :, start:stop] for z in tensors)

        def attend(layer: LinearAttention[Any], inputs: AttentionInputs) -> Tensor:
            with NoValueRead():
                return attend_across(layer, inputs, group)

        layer.sequence_parallel = attend
        before = dict(group.traffic.received)
        found = results(layer, tokens, None if mask is None else mask[:, start:stop], grad)
        received = {name: count - before.get(name, 0) for name, count in group.traffic.received.items()}
        return {**found, "received": {name: count for name, count in received.items() if count}}


class NoValueRead(TorchDispatchMode):
    """Raises where a value of a tensor is read: on a GPU that waits for everything before it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return func(*args, **(kwargs or {}))


def results(layer: LinearAttention[Any], tokens: list[Tensor], mask: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """Output, gradients of query, key and value, and those of learned tensors."""
    leaves = [z.clone().requires_grad_() for z in tokens]
    output = layer(*leaves, mask)
    (output * grad).sum().backward()
    found = {"output": output.detach()} | {f"grad {n}": z.grad for n, z in zip("qkv", leaves, strict=True)}  # type: ignore[dict-item]
    learned = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in layer.named_parameters()}
    return found | learned


def together(parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Parts of the tokens behind each other, and sums over processes of what belongs to the layer."""
    found = {}
    for name in parts[0]:
        if name == "received":
            continue
        values = [part[name] for part in parts]
        is_part = name == "output" or name.startswith("grad ")
        found[name] = torch.cat(values, 2) if is_part else torch.stack(values).sum(0)
    return found
