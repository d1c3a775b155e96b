"""DDP and FSDP2 are one process with the same global batch: losses, redraws and weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT, ModelCase, converted
from forked import in_processes
from strategies import ROWS, layers_of, loss_of, shard, share, train, without_dropout
from torch import Tensor

# Pairwise: every kind and every model at least twice, with and without what is learned.
CASES: dict[str, tuple[ModelCase, str, dict[str, Any]]] = {
    "bert redraw": (BERT, "favor_plus", {"redraw_interval": 2}),
    "gpt2 redraw": (GPT2, "favor_plus", {"redraw_interval": 1}),
    "vit learned favor_plus": (VIT, "favor_plus", {"learned": True}),
    "bert learned favor_sharp": (BERT, "favor_sharp", {"learned": True}),
    "gpt2 favor_sharp": (GPT2, "favor_sharp", {}),
    "vit favor_sharp": (VIT, "favor_sharp", {"redraw_interval": 1}),
    "gpt2 learned lara": (GPT2, "lara", {"learned": True}),
    "bert lara": (BERT, "lara", {"sample_noise": False}),
    "vit learned eva": (VIT, "eva", {"learned": True}),
    "bert eva": (BERT, "eva", {"sample_noise": False}),
}


def built(name: str) -> tuple[Any, list[dict[str, Tensor]]]:
    case, kind, changes = CASES[name]
    return converted(case, kind, **changes), [case.inputs(ROWS, seed=step) for step in range(3)]


def train_all(models: dict[str, Any], strategy: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (model, batches) in models.items():
        found |= {f"{name}: {key}": value for key, value in train(model, strategy, batches).items()}
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_is_that_of_one_process(tmp_path: Path, strategy: str, processes: int) -> None:
    models = {name: built(name) for name in CASES}
    expected = train_all(copy.deepcopy(models), "one")
    for found in in_processes(tmp_path, processes, train_all, models, strategy):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    redrawn = next(name for name in expected if name.startswith("bert redraw") and name.endswith("projection"))
    assert not torch.equal(expected[redrawn], dict(models["bert redraw"][0].named_buffers())[redrawn.split(": ")[1]])


# -- mixed precision --------------------------------------------------------------------------------------------------
def seen_dtypes(model: Any, batch: dict[str, Tensor], maps: bool) -> dict[str, Tensor]:
    """What `compute` of every layer is called with, and the dtypes of gradients, as bits of the answer."""
    model = shard(without_dropout(model), param_dtype=torch.bfloat16, maps=maps)
    layer = layers_of(model)[0]
    seen: dict[str, torch.dtype] = {}
    compute = type(layer).compute

    def spy(config: Any, state: Any, inputs: Any) -> Tensor:
        seen.update({name: tensor.dtype for name, tensor in state.items()}, query=inputs.query.dtype)
        output: Tensor = compute(config, state, inputs)
        return output

    type(layer).compute = staticmethod(spy)  # in this process alone
    loss_of(model(**share(batch))).backward()
    gradients = {f"grad {name}": p.grad.dtype for name, p in layer.named_parameters()}
    return {name: torch.tensor(dtype == torch.float32) for name, dtype in (seen | gradients).items()}


@pytest.mark.parametrize("maps", [True, False], ids=["units", "with their layers"])
def test_with_bfloat16_what_is_learned_stays_float32(tmp_path: Path, maps: bool) -> None:
    """If it is a unit of its own; what `fully_shard` alone would do shows that the test sees it."""
    model, batches = built("bert learned favor_sharp")
    learned = dict(layers_of(model)[0].named_parameters())
    for found in in_processes(tmp_path, 2, seen_dtypes, model, batches[0], maps):
        assert not found.pop("query")
        for name, is_float32 in found.items():
            assert bool(is_float32) == (maps or name not in learned), name
        assert set(learned) < set(found)
