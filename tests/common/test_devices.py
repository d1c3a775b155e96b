"""Weights that are somewhere else: on the meta device, on disk, in the CPU's memory while another device computes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from cases import largest, logits
from heads import CLASSES, Stock, convert, every_class_and_family, inputs

from hf_linattn.models import COUNTERPARTS


@every_class_and_family()
def test_offloaded_weights(stock: Stock, kind: str, tmp_path: Path) -> None:
    """To memory and to disk: what the layers hold is brought back when they are called."""
    model = convert(stock, kind)
    expected = logits(model, **inputs(stock))
    in_memory = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert largest(logits(in_memory, **inputs(stock)) - expected) < 1e-5
    on_disk = disk_offload(copy.deepcopy(model), str(tmp_path), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in on_disk.parameters())
    assert largest(logits(on_disk, **inputs(stock)) - expected) < 1e-5


@every_class_and_family()
def test_layers_offloaded_to_disk(stock: Stock, kind: str, tmp_path: Path) -> None:
    """`device_map` that keeps a layer on disk."""
    model = convert(stock, kind)
    expected = logits(model, **inputs(stock))
    model.save_pretrained(tmp_path / "model")
    layer = next(name for name, module in model.named_modules() if hasattr(module, "linattn")).split(".0.")[0] + ".0"
    places = {
        name: "cpu"
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        and not f"{name}.".startswith(f"{layer}.")
    }
    loaded = COUNTERPARTS[stock].from_pretrained(
        tmp_path / "model", device_map={**places, layer: "disk"}, offload_folder=str(tmp_path / "disk")
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert largest(logits(loaded, **inputs(stock)) - expected) < 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel() -> None:
    for stock in CLASSES:
        model = torch.nn.DataParallel(convert(stock, "favor_plus").cuda())
        batch = {name: value.cuda() for name, value in inputs(stock).items()}
        assert torch.isfinite(logits(model, **batch)).all()
