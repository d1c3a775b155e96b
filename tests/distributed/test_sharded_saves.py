"""Weights saved by several processes, in any layout, load into one, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import BERT, GPT2, VIT, ModelCase, converted
from forked import in_processes
from safetensors.torch import load_file
from strategies import loss_of, shard, share, split, whole_tensors
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from hf_linattn.distributed.fully_sharded import is_part
from hf_linattn.errors import CheckpointError

CASES = {
    "bert": (BERT, "favor_sharp", {"learned": True}),
    "gpt2": (GPT2, "lara", {"learned": True}),
    "vit": (VIT, "favor_plus", {"redraw_interval": 2}),
}
LAYOUTS = ("itself", "given shards", "full", "dcp", "heads", "ddp")
QUICK = {("itself", "bert"), ("itself", "gpt2"), ("full", "gpt2"), ("dcp", "vit"), ("heads", "bert")}
every_layout = pytest.mark.parametrize(
    ("layout", "name"),
    [
        pytest.param(layout, name, marks=[] if (layout, name) in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
        for name in CASES
        if (layout, name) != ("heads", "gpt2")  # which has one projection of queries, keys and values
    ],
)


def built(name: str) -> tuple[ModelCase, Any]:
    case, kind, changes = CASES[name]
    return case, converted(case, kind, **changes)


def optimizers(net: Any) -> list[torch.optim.Optimizer]:
    """One for split parameters and one for others, which cannot be stepped together."""
    groups = ([p for p in net.parameters() if is_part(p) == parts] for parts in (True, False))
    return [torch.optim.SGD(group, lr=0.1) for group in groups if group]


def save(model: Any, case: ModelCase, layout: str, folder: Path) -> dict[str, Tensor]:
    """Train a step, save. Returns the tensors that a process has then, gathered."""
    model.train()
    net = {"ddp": DistributedDataParallel, "heads": split}.get(layout, shard)(model)
    batch = case.inputs(8) if layout == "heads" else share(case.inputs(8))
    loss_of(net(**batch)).backward()
    for optimizer in optimizers(net):
        optimizer.step()
    with torch.no_grad():
        net(**batch)  # leaves the root gathered
    if layout == "ddp":
        model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    elif layout in ("itself", "heads"):
        model.save_pretrained(folder)
    elif layout == "given shards":
        model.save_pretrained(folder, state_dict=model.state_dict())
    elif layout == "full":
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        model.save_pretrained(folder, is_main_process=dist.get_rank() == 0, state_dict=state)
    else:
        dcp.save(get_model_state_dict(model), checkpoint_id=folder / "dcp")
        if dist.get_rank() == 0:
            model.config.save_pretrained(folder)
    dist.barrier()
    return whole_tensors(model)


@every_layout
def test_what_is_saved_loads_into_one_process(tmp_path: Path, name: str, layout: str) -> None:
    case, model = built(name)
    folder = tmp_path / "saved"
    expected = in_processes(tmp_path / "work", 2, save, model, case, layout, folder)[0]
    if layout == "dcp":
        dcp_to_torch_save(folder / "dcp", folder / "whole.pt")
        state = torch.load(folder / "whole.pt", weights_only=True)  # noqa: TID251
        loaded = type(model)(model.config)
        loaded.load_state_dict(state)
        loaded.save_pretrained(folder)
    loaded = case.auto.from_pretrained(folder)
    found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert found.keys() == expected.keys()
    assert [n for n, tensor in expected.items() if not torch.equal(found[n], tensor)] == []
    model.save_pretrained(tmp_path / "one")
    names, usual = (set(load_file(place / "model.safetensors")) for place in (folder, tmp_path / "one"))
    assert names == usual or layout == "full"  # which makes two of a tied tensor


def test_parts_that_cannot_be_gathered_are_refused(tmp_path: Path) -> None:
    """As DeepSpeed's third stage leaves parameters: empty, with what they are kept elsewhere."""
    _, model = built("bert")
    parameter: Any = next(model.parameters())
    parameter.ds_id, parameter.ds_numel = 0, parameter.numel()
    state = model.state_dict()
    parameter.data = torch.empty(0)
    with pytest.raises(CheckpointError, match="only parts of the weights"):
        model.save_pretrained(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    model.save_pretrained(tmp_path / "whole", state_dict=state)
