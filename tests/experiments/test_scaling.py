"""The plan on paper: costs that are known are counted right, and what it says fits and adds up."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results" / "scaling.json"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))


def part(name: str) -> Any:
    return importlib.import_module(f"scaling_parts.{name}")


def small(*, is_causal: bool = False) -> Any:
    costs = part("layer_costs")
    if is_causal:
        return costs.gpt2("small", n_embd=32, n_layer=2, n_head=2, vocab_size=100)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 100}
    return costs.bert("small", num_hidden_layers=2, **sizes)


@pytest.mark.parametrize("is_causal", [False, True])
def test_products_of_a_softmax_layer(is_causal: bool) -> None:
    costs = part("layer_costs").count_layer(small(is_causal=is_causal), None, 256, bf16=False)
    linear, attention = 24 * 32**2 * 256, 4 * 32 * 256**2 * (0.5 if is_causal else 1)
    products = part("layer_costs").products
    assert products(costs.forward) == linear + attention
    assert products(costs.backward) == 2 * linear + 2.5 * attention


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("attention", ["favor_plus", "eva"])
def test_products_of_linear_attention_grow_with_the_tokens(attention: str, is_causal: bool) -> None:
    settings = part("cluster").SETTINGS[attention]
    if attention == "eva" and is_causal:
        settings = part("cluster").BOUNDED["eva"].replace(max_chunks=8)
    short, long = (
        part("layer_costs").count_layer(small(is_causal=is_causal), settings, tokens, bf16=False)
        for tokens in (1024, 4096)
    )
    products = part("layer_costs").products
    assert long.saved / short.saved == pytest.approx(4, rel=0.15)
    assert products(long.forward) / products(short.forward) == pytest.approx(4, rel=0.15)
    assert products(long.backward) / products(short.backward) == pytest.approx(4, rel=0.15)
    assert long.seconds(1e12, 1e12) / short.seconds(1e12, 1e12) == pytest.approx(4, rel=0.15)
    assert products(short.forward) > 24 * 32**2 * 1024


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    count = part("layer_costs").count_layer
    plain, again = (count(small(), None, 256, bf16=False, checkpointing=flag) for flag in (False, True))
    assert again.saved == 4 * 32 * 256
    products = part("layer_costs").products
    assert products(again.backward) == products(plain.backward) + products(plain.forward)


def test_saved_bytes_are_those_of_real_tensors() -> None:
    counted = part("layer_costs").count_layer(small(), None, 64, bf16=False).saved
    config = type(small().config).from_dict({**small().config.to_dict(), "num_hidden_layers": 1})
    config._attn_implementation = "sdpa"
    layer = small().model(config).train().encoder.layer[0]
    saved: dict[int, torch.Tensor] = {}

    def save(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, nn.Parameter):
            saved[x.untyped_storage().data_ptr()] = x
        return x

    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        layer(torch.randn(1, 64, 32, requires_grad=True))
    found = sum(x.untyped_storage().nbytes() for pointer, x in saved.items() if pointer not in weights)
    assert counted == pytest.approx(found, rel=0.05)


def test_the_plan_fits_and_is_the_simplest_of_the_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = part("cluster")
    monkeypatch.setitem(cluster.ARCHITECTURES, "small", small())
    job = cluster.Job("small", "favor_plus", 4096, gpus=64, rows=8)
    machine = cluster.Machine(memory=1e8, reserved=0.0, latency=0.0)
    step = cluster.best_step(job, machine)
    assert step.memory <= 1e8
    assert step.used <= 64
    found = [cluster.plan_step(job, strategy, machine) for strategy in cluster.strategies(job)]
    fastest = min(other.seconds for other in found if other is not None)
    assert step.seconds <= 1.05 * fastest
    # More processes of a row hold less each; softmax cannot share one.
    alone, shared = (cluster.plan_step(job, cluster.Strategy("fsdp2", context), machine) for context in (1, 4))
    assert shared.memory < alone.memory
    assert shared.received > alone.received
    softmax = replace(job, attention="softmax")
    assert all(strategy.context == 1 for strategy in cluster.strategies(softmax))
    assert cluster.best_step(softmax, cluster.Machine(memory=1e5, reserved=0.0)) is None


@pytest.mark.slow
def test_traffic_of_ddp_and_fsdp2() -> None:
    for row in part("checks").check_traffic():
        assert row["computed / counted"] == pytest.approx(1, abs=0.05)


def test_the_page_is_what_the_results_say() -> None:
    tables = importlib.import_module("scaling").markdown(json.loads(RESULTS.read_text()))
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert all(table in page for table in tables)
