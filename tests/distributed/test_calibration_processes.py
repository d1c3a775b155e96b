"""Calibration on several processes takes in the batches of all: plain, under DDP, under FSDP2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BERT, GPT2
from forked import in_processes
from strategies import layers_of, shard, whole_tensors
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import hf_linattn
from hf_linattn.modules.kinds import lara_calibration

SETTINGS = {
    "gpt2 favor_sharp": (GPT2, "favor_sharp", {"variant": "dense"}),
    "bert learned favor_sharp": (BERT, "favor_sharp", {"learned": True}),
    "gpt2 lara": (GPT2, "lara", {}),
    "bert learned lara": (BERT, "lara", {"learned": True}),
}
ROWS = 2  # of a batch


def batches(lengths: tuple[int, ...] = (40, 17, 31, 24)) -> list[dict[str, Tensor]]:
    """Of several lengths, with padding."""
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 60, (ROWS, length), generator=torch.Generator().manual_seed(number))
        mask = torch.ones_like(ids)
        mask[0, length - 5 :] = 0
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def calibrated(models: dict[str, Any], strategy: str) -> dict[str, Tensor]:
    rank, size = (0, 1) if strategy == "one" else (dist.get_rank(), dist.get_world_size())
    share = len(batches()) // size
    own = batches()[rank * share : (rank + 1) * share]
    found: dict[str, Tensor] = {}
    for name, model in models.items():
        if strategy == "fsdp2":
            shard(model)
        wrapped = DistributedDataParallel(model) if strategy == "ddp" and "learned" in name else model
        hf_linattn.calibrate(wrapped, own, first_row=rank * share * ROWS)
        assert all(layer.is_calibrated for layer in layers_of(model))
        found |= {f"{name}: {key}": value for key, value in whole_tensors(model).items() if ".linattn." in key}
    return found


@pytest.mark.parametrize("strategy", ["plain", pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_statistics_are_those_of_all_batches(
    tmp_path: Path, strategy: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lara_calibration, "SAMPLE_SIZE", 64)  # fewer than there are tokens
    models = {
        name: hf_linattn.convert(case.build(), case.settings(kind, **changes))
        for name, (case, kind, changes) in SETTINGS.items()
    }
    expected = calibrated(copy.deepcopy(models), "one")
    every = in_processes(tmp_path, processes, calibrated, models, strategy)
    for name, tensor in expected.items():
        assert all(torch.equal(found[name], every[0][name]) for found in every), name
        torch.testing.assert_close(every[0][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
