"""Attention transfer on several processes is that of one with the same batches: plain, under DDP, under FSDP2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT, VOCAB, ModelCase
from forked import in_processes
from strategies import shard, share, whole_tensors
from torch import Tensor
from transfer_settings import EVA, FAVOR, LARA, transferable

from hf_linattn.errors import ConfigError, UnsupportedError
from hf_linattn.training import shard_linear_attention, transfer_attention

STEPS = 4


def equal_rows(case: ModelCase) -> list[dict[str, Tensor]]:
    return [case.inputs(4, seed=step) for step in range(2)]


def mixed_rows(case: ModelCase) -> list[dict[str, Tensor]]:
    """The first half of a batch has long rows, the other short ones, some of them no longer than a window."""
    found = []
    for step, lengths in enumerate([(32, 29, 12, 3), (32, 20, 4, 2)]):
        mask = torch.tensor([[1] * length + [0] * (32 - length) for length in lengths])
        ids = torch.randint(3, VOCAB, mask.shape, generator=torch.Generator().manual_seed(step))
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def own_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of this process, no longer than they have to be."""
    batch = share(batch)
    if "attention_mask" not in batch:
        return batch
    longest = int(batch["attention_mask"].sum(-1).max())
    return {name: tensor[:, :longest] for name, tensor in batch.items()}


def transfer(
    model: Any, batches: list[dict[str, Tensor]], strategy: str, target: str, layers: Any
) -> dict[str, Tensor]:
    if strategy != "one":
        batches = [own_rows(batch) for batch in batches]
    if strategy == "fsdp2":
        shard(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = transfer_attention(model, batches, steps=STEPS, target=target, layers=layers)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    return {"errors": torch.tensor([step.errors for step in found]), **whole_tensors(model)}


# A case, settings, what is trained on which layers, rows.
RUNS = {
    "bert favor": (BERT, FAVOR, "attention", None, mixed_rows),
    "gpt2 lara": (GPT2, LARA, "attention", [0], equal_rows),
    "bert eva": (BERT, EVA, "attention", None, mixed_rows),
    "vit favor": (VIT, FAVOR, "hidden_states", None, equal_rows),
    "bert lara": (BERT, LARA, "hidden_states", [0], mixed_rows),
    "gpt2 favor": (GPT2, FAVOR, "hidden_states", None, mixed_rows),
}


def transfer_all(models: dict[str, Any], strategy: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, model in models.items():
        case, _, target, layers, rows = RUNS[name]
        done = transfer(model, rows(case), strategy, target, layers)
        found |= {f"{name}: {key}": value for key, value in done.items()}
    return found


def refused(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    shard(model, maps=False)
    with pytest.raises(ConfigError, match="shard_linear_attention.* wrap FavorPlusAttention"):
        transfer_attention(model, batches, steps=1)
    with pytest.raises(UnsupportedError, match="sharded already"):
        shard_linear_attention(model)
    return {}


def test_maps_that_are_gathered_with_their_layers_are_refused(tmp_path: Path) -> None:
    """Those layers run without gradients, and FSDP2 would take the maps away before the backward pass."""
    in_processes(tmp_path, 2, refused, transferable(BERT, FAVOR), equal_rows(BERT))


@pytest.mark.parametrize("strategy", ["plain", "fsdp2"])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_are_one(tmp_path: Path, strategy: str, processes: int) -> None:
    models = {name: transferable(case, settings) for name, (case, settings, *_) in RUNS.items()}
    expected = transfer_all(copy.deepcopy(models), "one")
    for found in in_processes(tmp_path, processes, transfer_all, models, strategy):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    errors = {name: tensor for name, tensor in expected.items() if name.endswith("errors")}
    assert all((tensor[-1] - tensor[0]).abs().max() > 1e-3 for tensor in errors.values()), errors
