"""Heads split over processes: outputs and gradients of one process."""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BERT, GPT2, VIT, ModelCase, away_from_start, converted
from forked import in_processes
from strategies import loss_of, shard, split, without_dropout
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed import DistributedConfig

import hf_linattn
from hf_linattn.distributed.fully_sharded import whole
from hf_linattn.distributed.tensor_parallel import split_heads
from hf_linattn.errors import ConfigError, UnsupportedError
from hf_linattn.training import key_noise

# Earlier releases know a class of this name that is for experts alone.
HAS_DISTRIBUTED_CONFIG = "tp_plan" in inspect.signature(DistributedConfig).parameters
CASES = {
    "bert favor_plus": (BERT, "favor_plus", {"shared_projection": True, "num_features": 4}),  # as many as heads
    "vit favor_plus": (VIT, "favor_plus", {"redraw_interval": 2}),
    "bert favor_sharp": (BERT, "favor_sharp", {"statistics": "calibrated"}),
    "vit learned favor_sharp": (VIT, "favor_sharp", {"learned": True}),
    "vit lara": (VIT, "lara", {"sample_noise": False}),
    "bert learned lara": (BERT, "lara", {"learned": True}),
    "bert calibrated lara": (BERT, "lara", {"proposal_source": "calibrated", "sample_noise": False}),
    "bert eva": (BERT, "eva", {"sample_noise": False}),
    "vit learned eva": (VIT, "eva", {"learned": True}),
    "bert eva with noise": (BERT, "eva", {"sample_noise": True, "slot_dropout": 0.3}),
    "bert calibrated lara with noise": (BERT, "lara", {"proposal_source": "calibrated", "sample_noise": True}),
}


def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    case, kind, changes = CASES[name]
    model = away_from_start(hf_linattn.convert(case.build(), case.settings(kind, **changes)), case).double()
    batch = {key: z.double() if z.is_floating_point() else z for key, z in case.inputs(2).items()}
    if case is BERT:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 30:] = 0
    return without_dropout(model), batch


def outputs(models: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (model, batch) in models.items():
        assert key_noise(model, 1, rows=2) == (2 if "noise" in name else 0)
        output = model(**batch)
        loss_of([output[0].double()]).backward()
        gradients = {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None}
        found |= {f"{name}: {key}": value for key, value in {"output": output[0], **gradients}.items()}
    return found


def outputs_when_split(models: dict[str, Any]) -> dict[str, Tensor]:
    # Copies, as a moving average of the weights takes them, are split as well.
    return outputs({name: (copy.deepcopy(split(model)), batch) for name, (model, batch) in models.items()})


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_split_heads_are_those_of_one_process(tmp_path: Path, processes: int) -> None:
    """With four processes each has one head, which would otherwise read all of them without an error."""
    models = {name: built(name) for name in CASES}
    expected = outputs(copy.deepcopy(models))
    for found in in_processes(tmp_path, processes, outputs_when_split, models):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    learned = [name for name in expected if ".linattn." in name]
    assert len(learned) > 20


# -- with FSDP2 -------------------------------------------------------------------------------------------------------
def train_on_a_grid(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two pairs of processes: those of a pair share the heads, the pairs share the rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "heads"))
    split(model, mesh=mesh["heads"])
    shard(model, mesh=mesh["rows"])
    rows = {name: tensor.chunk(2)[mesh["rows"].get_local_rank()] for name, tensor in batch.items()}
    loss_of([model(**rows)[0].double()]).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert learned lara", "vit learned favor_sharp"])
def test_together_with_fsdp2(tmp_path: Path, name: str) -> None:
    model, batch = built(name)
    batch.pop("attention_mask", None)  # so that rows count alike
    one = copy.deepcopy(model)
    loss_of([one(**batch)[0].double()]).backward()
    expected = {key: p.grad for key, p in one.named_parameters() if p.grad is not None}
    for found in in_processes(tmp_path, 4, train_on_a_grid, model, batch):
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=key: f"{n}: {m}")


# -- through Transformers ---------------------------------------------------------------------------------------------
TP_PLANS = {
    "bert-mlm": ("bert.encoder.layer.*.attention", ("self.query", "self.key", "self.value"), "output.dense"),
    "vit": ("vit.layers.*.attention", ("q_proj", "k_proj", "v_proj"), "o_proj"),
}


def loaded(case: ModelCase, folder: Path, native: bool) -> Any:
    """A checkpoint loaded with a plan of Transformers."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)  # in this process alone
    place, columns, rows = TP_PLANS[case.name]
    plan = {f"{place}.{name}": "colwise" for name in columns} | {f"{place}.{rows}": "rowwise"}
    config = DistributedConfig(tp_plan=plan, tp_size=dist.get_world_size())
    if native:
        return case.stock.from_pretrained(folder, distributed_config=config, attn_implementation="favor_plus")
    return case.auto.from_pretrained(folder, distributed_config=config)


def by_plan(folder: Path) -> dict[str, Tensor]:
    found = {}
    for case in (BERT, VIT):
        model = loaded(case, folder / case.name, native=False)
        with pytest.raises(UnsupportedError, match="attends with 4 heads; got queries with 2"):
            model(**case.inputs(2))
        split_heads(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        with torch.no_grad():
            found[case.name] = model(**case.inputs(2))[0]
        model.save_pretrained(folder / f"{case.name}-split")
    with pytest.raises(UnsupportedError, match="same directions for those of every process"):
        loaded(BERT, folder / "stock", native=True)(**BERT.inputs(2))
    return found


@pytest.mark.skipif(not HAS_DISTRIBUTED_CONFIG, reason="Transformers splits models in another way")
def test_a_plan_of_transformers(tmp_path: Path) -> None:
    expected = {}
    for case in (BERT, VIT):
        model = away_from_start(converted(case, "favor_plus", learned=True), case)
        model.save_pretrained(tmp_path / case.name)
        expected[case.name] = model(**case.inputs(2))[0].detach()
    BERT.build().save_pretrained(tmp_path / "stock")
    for found in in_processes(tmp_path / "run", 2, by_plan, tmp_path):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    for case in (BERT, VIT):
        again, saved = (case.auto.from_pretrained(tmp_path / f"{case.name}{end}") for end in ("-split", ""))
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), saved.parameters(), strict=True))
        assert again(**case.inputs(2))[0].shape == expected[case.name].shape


# -- what is refused --------------------------------------------------------------------------------------------------
def refusals(model: Any, gpt2: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(UnsupportedError, match="one projection \\(c_attn\\)"):
        split_heads(gpt2, mesh)
    with pytest.raises(ConfigError, match="no linear attention to split"):
        split_heads(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(ConfigError, match="must have one dimension"):
        split_heads(model, init_device_mesh("cpu", (1, dist.get_world_size())))
    parted = split(copy.deepcopy(model), heads=False)
    with pytest.raises(UnsupportedError, match=r"attends with 4 heads; got queries with .*split_heads\(model, mesh\)"):
        parted(**batch)
    split(model)
    with pytest.raises(UnsupportedError, match="look at all heads of a layer"):
        hf_linattn.calibrate(model, [batch])
    return {}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_cannot_be_split_is_refused(tmp_path: Path, processes: int) -> None:
    model, batch = built("bert favor_sharp")
    in_processes(tmp_path, processes, refusals, model, converted(GPT2, "favor_plus"), batch)


def uneven(model: Any) -> dict[str, Tensor]:
    with pytest.raises(ConfigError, match="4 heads of BertSelfAttention do not go evenly into 3 processes"):
        split_heads(model, init_device_mesh("cpu", (3,)))
    return {}


def test_heads_that_do_not_go_evenly(tmp_path: Path) -> None:
    in_processes(tmp_path, 3, uneven, converted(BERT, "favor_plus"))
