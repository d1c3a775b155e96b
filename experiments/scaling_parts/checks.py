"""The arithmetic of `cluster.py` beside runs on a CPU: activations, time, and bytes exchanged by processes."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertForSequenceClassification

import hf_linattn
from hf_linattn.bench.memory import peak_bytes
from hf_linattn.bench.timing import Failure, time_calls, time_in_turns

from .cluster import SETTINGS
from .layer_costs import Architecture, bert, count_layer

SMALL = bert("bert-mini", hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
LENGTHS = (1024, 2048, 4096)
MEBI = 2**20


def check_memory() -> list[dict[str, Any]]:
    """Activations of a step in float32: counted, and the most that was held at once beyond weights and gradients."""
    found = []
    for tokens in LENGTHS:
        for attention in SETTINGS:
            step = _step(SMALL, attention, tokens)
            step()
            measured = peak_bytes(step)
            counted = SMALL.layers * count_layer(SMALL, SETTINGS[attention], tokens, bf16=False).saved
            row = {"tokens": tokens, "attention": attention, "counted MiB": counted / MEBI}
            found.append({**row, "measured MiB": measured / MEBI, "counted / measured": counted / measured})
    return found


def check_time(seconds: float) -> list[dict[str, Any]]:
    """Time of a step on one core: computed from the rates of one product and one sum of this machine, and measured."""
    torch.set_num_threads(1)
    rate, bandwidth = _rates(seconds)
    found = []
    for tokens in LENGTHS:
        steps = {attention: _step(SMALL, attention, tokens) for attention in SETTINGS}
        for attention, timed in _time(steps, seconds).items():
            costs = count_layer(SMALL, SETTINGS[attention], tokens, bf16=False)
            computed = SMALL.layers * costs.seconds(rate, bandwidth)
            row = {"tokens": tokens, "attention": attention, "computed s": computed, "measured s": timed}
            found.append({**row, "computed / measured": computed / timed})
    return found


def _rates(seconds: float) -> tuple[float, float]:
    """Operations per second of a product of the size that a layer has, and bytes per second of a sum as large."""
    x, weight = torch.randn(1024, 256), torch.randn(256, 1024)
    y = torch.randn(1024, 1024)
    timed = _time({"product": lambda: x @ weight, "sum": lambda: y + y}, seconds / 4)
    return 2 * x.numel() * weight.shape[1] / timed["product"], 3 * 4 * y.numel() / timed["sum"]


def _time(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median CPU seconds of each, measured in turns: other programs of the machine do not count."""
    found = {}
    timed_calls = time_in_turns(calls, seconds=seconds, measure=partial(time_calls, clock=time.process_time))
    for name, timed in timed_calls.items():
        if isinstance(timed, Failure):
            raise RuntimeError(f"{name}: {timed.reason}")
        found[name] = timed.median
    return found


def _step(architecture: Architecture, attention: str, tokens: int) -> Callable[[], None]:
    """A forward and backward pass of a classifier; gradients exist before it."""
    model = _classifier(architecture, attention, tokens)
    ids, labels = torch.randint(1000, (1, tokens)), torch.zeros(1, dtype=torch.long)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        model(input_ids=ids, labels=labels).loss.backward()

    return step


def _classifier(architecture: Architecture, attention: str, tokens: int) -> Any:
    config = type(architecture.config).from_dict(
        {**architecture.config.to_dict(), "max_position_embeddings": tokens, "vocab_size": 1000}
    )
    model: Any = BertForSequenceClassification(config)
    settings = SETTINGS[attention]
    return (model if settings is None else hf_linattn.convert(model, settings)).train()


# -- bytes that processes exchange ------------------------------------------------------------------------------------
def check_traffic() -> list[dict[str, Any]]:
    """What gradients and sharded weights take in a step, on 2 and 4 processes, in float32: computed and counted."""
    found = []
    for processes in (2, 4):
        for name, count in (("ddp", _count_ddp), ("fsdp2", _count_fsdp2)):
            counted = _on_processes(count, processes)
            parameters = sum(p.numel() for p in _classifier(SMALL, "favor_plus", 256).parameters())
            computed = 4 * parameters * (2 if name == "ddp" else 3) * (processes - 1) / processes
            row = {
                "strategy": name,
                "processes": processes,
                "computed MB": computed / 1e6,
                "counted MB": counted / 1e6,
            }
            found.append({**row, "computed / counted": computed / counted})
    return found


def _on_processes(count: Callable[[], float], processes: int) -> float:
    """What `count` returns on the first of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (count, processes, folder), nprocs=processes, start_method="fork")
        return float(Path(folder, "counted").read_text())


def _process(rank: int, count: Callable[[], float], processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    counted = count()
    if rank == 0:
        Path(folder, "counted").write_text(str(counted))
    dist.destroy_process_group()


def _backward(model: Any) -> None:
    model(input_ids=torch.randint(1000, (1, 256)), labels=torch.zeros(1, dtype=torch.long)).loss.backward()


def _count_ddp() -> float:
    """Bytes of all buckets, each of which a ring passes twice, less the own part."""
    processes, total = dist.get_world_size(), 0.0
    model = DistributedDataParallel(_classifier(SMALL, "favor_plus", 256))

    def reduced(bucket: dist.GradBucket) -> Any:
        nonlocal total
        total += 2 * bucket.buffer().nbytes * (processes - 1) / processes
        return allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, lambda state, bucket: reduced(bucket))
    _backward(model)
    return total


def _count_fsdp2() -> float:
    """Bytes of gathered weights and scattered gradients, less the own part."""
    processes, total = dist.get_world_size(), 0.0
    model = _classifier(SMALL, "favor_plus", 256)
    mesh = init_device_mesh("cpu", (processes,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)

    def counted(collective: Any, place: int, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal total
            whole = options[name] if name in options else arguments[place]
            total += whole.nbytes * (processes - 1) / processes
            return collective(*arguments, **options)

        return call

    with contextlib.ExitStack() as stack:
        # PyTorch 2.13 has new names for these two.
        for collective, place, name in (
            ("all_gather_into_tensor", 0, "output_tensor"),
            ("all_gather_single", 0, "output_tensor"),
            ("reduce_scatter_tensor", 1, "input"),
            ("reduce_scatter_single", 1, "input"),
        ):
            if hasattr(dist, collective):
                stack.enter_context(
                    mock.patch.object(dist, collective, counted(getattr(dist, collective), place, name))
                )
        _backward(model)
    return total
