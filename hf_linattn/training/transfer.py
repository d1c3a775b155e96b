"""Attention transfer: a converted model's own parameters are trained towards the softmax attention it replaces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..conversion.batches import prepare_inputs, read_batches
from ..integrations.call import Call
from ..integrations.interface import linear_output, softmax_output
from ..integrations.layers import linear_layer
from ..integrations.observe import observed_attention
from ..integrations.wrappers import inside


def transfer_attention(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, steps: int = 200, learning_rate: float = 1e-2
) -> list[list[float]]:
    model = inside(model, "transfer_attention")
    layers = {m: layer for m in model.modules() if (layer := linear_layer(m)) is not None}
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    errors: list[Tensor] = []
    started: set[nn.Module] = set()

    def on_call(module: nn.Module, call: Call) -> Tensor:
        target = softmax_output(module, call)
        layer = linear_layer(module)
        if layer is None:
            return target
        if module not in started:
            layer.start_learning(call)
            started.add(module)
        with torch.enable_grad():
            output = linear_output(module, call)
            real = None if call.key_mask is None else call.key_mask[:, :, None, None]
            off = (output.float() - target.float()).square()
            mean = target.float().mean((0, 1), keepdim=True)
            spread = (target.float() - mean).square()
            if real is not None:
                off, spread = off * real, spread * real
            loss = off.sum((0, 1, 3)) / spread.sum((0, 1, 3))
            loss.mean().backward()
        errors.append(loss.detach())
        return target

    history = []
    step = 0
    with observed_attention(model, on_call):
        model.eval()
        while step < steps:
            for batch in batches:
                inputs, _ = prepare_inputs(model, batch)
                errors.clear()
                with torch.no_grad():
                    model(**inputs)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.step()
                optimizer.zero_grad()
                history.append([float(e.mean()) ** 0.5 for e in errors])
                step += 1
                if step == steps:
                    break
    return history
