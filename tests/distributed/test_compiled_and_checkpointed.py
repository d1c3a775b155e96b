"""Compiled layers and activation checkpointing under DDP and FSDP2: the plain run of one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT, checkpoint_activations, converted
from forked import in_processes
from strategies import LAYERS, ROWS, train
from torch import Tensor
from torch._dynamo.utils import counters

CASES = {
    "bert learned lara": (BERT, "lara", {"learned": True}),
    "gpt2 redraw": (GPT2, "favor_plus", {"redraw_interval": 1}),
    "vit learned eva": (VIT, "eva", {"learned": True}),
}


def built(name: str) -> tuple[Any, list[dict[str, Tensor]]]:
    case, kind, changes = CASES[name]
    return converted(case, kind, **changes), [case.inputs(ROWS, seed=step) for step in range(2)]


def train_with(model: Any, batches: list[dict[str, Tensor]], strategy: str, way: str) -> dict[str, Tensor]:
    """In the order that `fully_shard` asks for: first what is done to the layers, then sharding."""
    counters.clear()  # of tests before this process was forked
    if way == "checkpointed":
        checkpoint_activations(model)
    else:
        for layer in [module for module in model.modules() if type(module).__name__ in LAYERS]:
            layer.compile(backend="aot_eager")
    found = train(model, strategy, batches)
    assert bool(counters["frames"]["ok"]) == (way == "compiled")
    return found


@pytest.mark.parametrize(
    ("way", "name", "strategy"),
    [
        ("checkpointed", "bert learned lara", "fsdp2"),
        ("checkpointed", "gpt2 redraw", "ddp"),
        ("checkpointed", "vit learned eva", "fsdp2"),
        pytest.param("compiled", "bert learned lara", "ddp", marks=pytest.mark.slow),
        pytest.param("compiled", "gpt2 redraw", "fsdp2", marks=pytest.mark.slow),
        pytest.param("compiled", "vit learned eva", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_the_plain_one(tmp_path: Path, way: str, name: str, strategy: str) -> None:
    model, batches = built(name)
    expected = train(copy.deepcopy(model), "one", batches)
    for found in in_processes(tmp_path, 2, train_with, model, batches, strategy, way):
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=key: f"{n}: {m}")
