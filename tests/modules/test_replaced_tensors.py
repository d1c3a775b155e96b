"""The tensors of a layer, when another library has put something else under their names."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, MATRIX, VIT, ModelCase, converted, largest, matrix
from forked import in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import replicate
from torch.nn.utils import parametrize, prune

import hf_linattn
from hf_linattn.errors import UnsupportedError
from hf_linattn.modules.base import LinearAttention

# EVA has learned maps; LARA too, and in a causal layer a learned offset of the mass.
LEARNED = [case for case in MATRIX if case.values[0] in ("lara", "eva")]


def trained(case: ModelCase, kind: str, **changes: Any) -> Any:
    """A converted model whose learned tensors are not what they began with."""
    model = converted(case, kind, **changes)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in own_parameters(model):
            parameter.normal_(std=0.5, generator=generator)
    return model


def own_parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if ".linattn." in name]


def attention_layers(model: Any) -> Iterator[LinearAttention]:
    return (module for module in model.modules() if isinstance(module, LinearAttention))


def replicas(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A replica as `nn.DataParallel` makes it; only the copy between devices is imitated."""
    names = replicate.__globals__
    monkeypatch.setitem(
        names, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [[t.clone() for t in tensors]]
    )
    monkeypatch.setitem(names, "_get_device_index", lambda device, *args, **kwargs: 0)
    return replicate(model, [0])[0]


@pytest.mark.parametrize(("kind", "case"), LEARNED)
def test_a_replica_computes_and_learns(kind: str, case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = trained(case, kind), case.inputs()
    want = model(**inputs)[0]
    got = replicas(model, monkeypatch)(**inputs)[0]
    assert torch.equal(got, want)
    got.square().sum().backward()
    assert not [name for name, parameter in own_parameters(model) if parameter.grad is None]


@pytest.mark.parametrize(("kind", "case"), LEARNED)
def test_every_learned_tensor_is_in_the_graph_of_a_replica(
    kind: str, case: ModelCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(case, kind, window_size=64 if case is not VIT else 8).train()  # rows fit: no map is used
    replicas(model, monkeypatch)(**case.inputs())[0].sum().backward()
    assert not [name for name, parameter in own_parameters(model) if parameter.grad is None]


@pytest.mark.parametrize(("kind", "case"), LEARNED)
def test_a_pruned_tensor_is_used_as_pruned(kind: str, case: ModelCase) -> None:
    model, inputs = trained(case, kind), case.inputs()
    want = model(**inputs)[0]
    names = [name.rpartition(".")[2] for name, _ in own_parameters(model)]
    for layer in attention_layers(model):
        for name in set(names):
            prune.identity(layer, name)
    assert torch.equal(model(**inputs)[0], want)
    for layer in attention_layers(model):
        for name in set(names):
            prune.random_unstructured(layer, name, amount=0.5)
    pruned = model(**inputs)[0]
    assert largest(pruned - want) > 1e-4
    for layer in attention_layers(model):
        for name in set(names):
            prune.remove(layer, name)
    assert torch.equal(model(**inputs)[0], pruned)


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2, VIT))
def test_a_parametrized_tensor_is_used_as_parametrized(kind: str, case: ModelCase) -> None:
    """Buffers too: every kind has one or a parameter."""
    model, inputs = trained(case, kind), case.inputs()
    want = copy.deepcopy(model)
    for layer, twin in zip(attention_layers(model), attention_layers(want), strict=True):
        for name, tensor in twin.tensors().items():
            if tensor.ndim and torch.is_floating_point(tensor):
                parametrize.register_parametrization(layer, name, Doubled(), unsafe=True)
                tensor.data.mul_(2)
    assert torch.equal(model(**inputs)[0], want(**inputs)[0])


@pytest.mark.parametrize("kind", ["lara", "eva"])
def test_a_state_is_made_anew_when_a_parametrized_tensor_changes(kind: str) -> None:
    """A tensor that is computed at every access has no version to compare."""
    model, inputs = trained(GPT2, kind), GPT2.inputs(batch=1)
    for layer in attention_layers(model):
        for name, _ in list(layer.named_parameters()):
            parametrize.register_parametrization(layer, name, Doubled(), unsafe=True)
    with torch.no_grad():
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        whole = model(first).logits[:, -5:-1].argmax(-1)
    assert torch.equal(first[:, -4:], whole)


@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2))
@pytest.mark.parametrize("change", ["missing", "part"])
def test_a_tensor_that_is_not_there_raises(kind: str, case: ModelCase, change: str) -> None:
    model = trained(case, kind)
    layer = next(attention_layers(model))
    name, tensor = next((n, t) for n, t in layer.tensors().items() if t.ndim)
    delattr(layer, name)
    if change == "part":
        setattr(layer, name, tensor.detach().flatten()[:3])
    with pytest.raises(UnsupportedError, match=f"Layer 0 .*needs its tensor {name!r}"):
        model(**case.inputs())


def _train_in_fsdp(use_orig_params: bool) -> dict[str, Tensor]:
    for kind, case in (("lara", BERT), ("eva", GPT2)):
        model = trained(case, kind)
        inputs = case.inputs()
        want = model(**inputs)[0].detach()
        wrapped = FullyShardedDataParallel(
            model,
            use_orig_params=use_orig_params,
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            device_id=torch.device("cpu"),
        )
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        got = wrapped(**inputs)[0]
        assert torch.equal(got, want), (kind, largest(got - want))
        got.square().mean().backward()
        optimizer.step()
        assert largest(wrapped(**inputs)[0] - want) > 1e-5
        with FullyShardedDataParallel.summon_full_params(wrapped):
            assert all(layer.tensors() for layer in attention_layers(wrapped))
    return {}


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_parameters_of_fsdp(tmp_path: Path, use_orig_params: bool) -> None:
    in_processes(tmp_path, 2, _train_in_fsdp, use_orig_params)


def test_calibration_finds_the_layers_of_a_parametrized_model() -> None:
    model = trained(GPT2, "lara")
    for layer in attention_layers(model):
        parametrize.register_parametrization(layer, "mass_offset", Doubled(), unsafe=True)
    hf_linattn.calibrate(model, [GPT2.inputs()])
    assert torch.isfinite(model(**GPT2.inputs())[0]).all()
