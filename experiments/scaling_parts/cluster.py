"""Memory, communication and time of a training step on a cluster, from the costs of a layer.

Nothing of this was measured on a cluster: it is arithmetic with the assumptions of `Machine`, each of which is an
argument of `scaling.py`. What of it can be checked on a CPU is in `checks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import hf_linattn
from hf_linattn.distributed.eva_plan import eva_traffic
from hf_linattn.distributed.plan import SharedLayer, expected_traffic
from hf_linattn.modules.defaults import resolve

from .layer_costs import ARCHITECTURES, Architecture, LayerCosts, count_layer

SETTINGS: dict[str, Any] = {
    "softmax": None,
    "favor_plus": hf_linattn.FavorPlusConfig(learned=True),
    "eva": hf_linattn.EvaConfig(learned=True),
}
# In a causal model summaries of all earlier chunks are read, unless their number is bounded.
BOUNDED = {"eva": hf_linattn.EvaConfig(learned=True, max_chunks=128)}
# Attention whose sequences several processes can share (docs/sequence_parallelism.md).
SHARED = ("favor_plus", "eva")

# Bytes per parameter. Float32 weights, gradients, two moments of Adam, and gradients once more in DDP's buckets.
DDP_STATES = 4 + 4 + 8 + 4
# Sharded; and what is whole at a time, of the largest layer: bfloat16 weights (two layers) and gradients.
FSDP_STATES, FSDP_LAYER = 4 + 4 + 8, 2 * 2 + 4
# bfloat16 weights, whole; bfloat16 gradients, float32 weights and two moments, sharded.
ZERO2_WEIGHTS, ZERO2_SHARDED = 2, 2 + 12
# Bytes per logit of a language model: bfloat16, float32, log-softmax and gradient.
LOGIT = 2 + 4 + 4 + 4


@dataclass(frozen=True)
class Machine:
    """Assumptions about GPUs and their network.

    peak: bfloat16 operations per second. attained: The share of it that matrix products reach.
    bandwidth: Bytes per second of the memory that operators reach.
    memory: Bytes of a GPU. reserved: What of it the driver, CUDA, NCCL and fragmentation take.
    per_node: GPUs of a node. node_bandwidth, network_bandwidth: Bytes per second and GPU, within a node and between
        nodes, that collectives reach. latency: Seconds before a collective moves anything, per doubling of processes.
    """

    peak: float = 989e12
    attained: float = 0.5
    bandwidth: float = 2.3e12
    memory: float = 80e9
    reserved: float = 6e9
    per_node: int = 8
    node_bandwidth: float = 300e9
    network_bandwidth: float = 35e9
    latency: float = 10e-6

    @property
    def rate(self) -> float:
        return self.peak * self.attained

    def seconds(self, received: float, processes: int, calls: float = 1.0) -> float:
        """How long collectives among processes take in which each receives so many bytes."""
        bandwidth = self.node_bandwidth if processes <= self.per_node else self.network_bandwidth
        return received / bandwidth + calls * self.latency * max(1.0, math.log2(max(2, processes)))


@dataclass(frozen=True)
class Strategy:
    """How a step is split.

    config: Of `recipes/configs/accelerate`. context: Processes that share a row. checkpointing: Layers are computed
    again in the backward pass.
    """

    config: str
    context: int = 1
    checkpointing: bool = False


@dataclass(frozen=True)
class Job:
    """A training step: `rows` sequences of `tokens` on so many GPUs."""

    model: str
    attention: str
    tokens: int
    gpus: int
    rows: int


@dataclass(frozen=True)
class Step:
    """What a step takes. used: GPUs that have work. memory, received: Bytes of a GPU. Times in seconds."""

    strategy: Strategy
    used: int
    batch: int
    memory: float
    received: float
    compute: float
    waiting: float

    @property
    def seconds(self) -> float:
        return self.compute + self.waiting


@cache
def layer(model: str, attention: str, tokens: int, checkpointing: bool) -> LayerCosts:
    architecture = ARCHITECTURES[model]
    return count_layer(architecture, settings_of(architecture, attention), tokens, checkpointing=checkpointing)


def settings_of(architecture: Architecture, attention: str) -> Any:
    """The settings of a kind in this model; `None` for softmax."""
    return (BOUNDED if architecture.is_causal else {}).get(attention, SETTINGS[attention])


def strategies(job: Job) -> Iterator[Strategy]:
    """All that the recipes have a config for, the simplest first: whole rows, DDP, nothing computed twice."""
    contexts = [2**power for power in range(10)] if job.attention in SHARED else [1]
    for context in contexts:
        for config in ("ddp", "fsdp2", "zero2"):
            for checkpointing in (False, True):
                # Parts of at least 1024 tokens; ZeRO has no groups that share a row.
                enough = context == 1 or (job.tokens // context >= 1024 and config != "zero2")
                if context <= job.gpus and enough:
                    yield Strategy(config, context, checkpointing)


def best_step(job: Job, machine: Machine) -> Step | None:
    """The simplest of the steps that fit into memory and take at most 5 % longer than the fastest."""
    found = [step for strategy in strategies(job) if (step := plan_step(job, strategy, machine)) is not None]
    fastest = min((step.seconds for step in found), default=0.0)
    return next((step for step in found if step.seconds <= 1.05 * fastest), None)


def plan_step(job: Job, strategy: Strategy, machine: Machine) -> Step | None:
    """The step with the largest batch that fits into a GPU; `None` if no row does."""
    replicas = min(job.gpus // strategy.context, job.rows)
    share = job.rows // replicas
    batch = share
    while batch >= 1:
        if share % batch == 0:
            step = _step(job, strategy, machine, replicas, share, batch)
            if step.memory <= machine.memory - machine.reserved:
                return step
        batch -= 1
    return None


def _step(job: Job, strategy: Strategy, machine: Machine, replicas: int, share: int, batch: int) -> Step:
    architecture = ARCHITECTURES[job.model]
    costs = layer(job.model, job.attention, job.tokens, strategy.checkpointing)
    processes = replicas * strategy.context
    parameters = architecture.parameters(job.tokens)
    logits = architecture.head_outputs * job.tokens
    head = 3 * 2 * architecture.width * logits / machine.rate + LOGIT * logits / machine.bandwidth
    compute = share * (architecture.layers * costs.seconds(machine.rate, machine.bandwidth) + head) / strategy.context
    memory = _states(strategy, parameters, architecture.layer_parameters(), processes)
    memory += batch * _activations(job, strategy, costs)
    received, waiting = _gradients(strategy, machine, parameters, processes, share // batch, compute)
    if strategy.context > 1:
        batches = share // batch
        exchanged, calls = (batches * z for z in _sequence(job, strategy, batch))
        received += exchanged
        waiting += machine.seconds(exchanged, strategy.context, calls)
    return Step(strategy, processes, batch, memory, received, compute, waiting)


def _states(strategy: Strategy, parameters: int, largest: int, processes: int) -> float:
    """Weights, gradients and optimizer."""
    if strategy.config == "ddp":
        return DDP_STATES * parameters
    if strategy.config == "fsdp2":
        return FSDP_STATES * parameters / processes + FSDP_LAYER * largest
    return ZERO2_WEIGHTS * parameters + ZERO2_SHARDED * parameters / processes


def _activations(job: Job, strategy: Strategy, costs: LayerCosts) -> float:
    """Of one row, or the part of it that a GPU has: what linear attention saves grows with the tokens."""
    architecture = ARCHITECTURES[job.model]
    held = architecture.layers * costs.saved + LOGIT * architecture.head_outputs * job.tokens
    if strategy.checkpointing:  # and what one layer holds while it is computed again
        held += layer(job.model, job.attention, job.tokens, False).saved
    return held / strategy.context


def _gradients(
    strategy: Strategy, machine: Machine, parameters: int, processes: int, batches: int, compute: float
) -> tuple[float, float]:
    """Bytes that gradients and sharded weights take, and how long a step waits for them.

    A collective runs beside the computation of the layer before it. DDP exchanges in the last of the accumulated
    batches alone; FSDP2 in every one, weights twice.
    """
    others = (processes - 1) / processes
    if strategy.config == "ddp":
        received, beside, calls = 2 * 4 * parameters * others, 2 / 3 * compute / batches, parameters / 6.5e6
    elif strategy.config == "fsdp2":
        received, beside, calls = 3 * 2 * parameters * others * batches, compute, 75.0 * batches
    else:
        received, beside, calls = 2 * 2 * parameters * others, 2 / 3 * compute / batches, parameters / 1e8
    return received, max(0.0, machine.seconds(received, processes, calls) - beside) if processes > 1 else 0.0


def _sequence(job: Job, strategy: Strategy, batch: int) -> tuple[float, float]:
    """Bytes that a process receives in all layers for a batch of shared rows, forward and backward, and in how many
    collectives. With checkpointing forward passes run twice."""
    traffic = _traffic(job, strategy, batch)
    again = 2 if strategy.checkpointing else 1
    times = {name: 1 if name.endswith("backward") else again for name in traffic}
    layers = ARCHITECTURES[job.model].layers
    return layers * sum(traffic[name] * times[name] for name in traffic), layers * sum(times.values())


def _traffic(job: Job, strategy: Strategy, batch: int) -> dict[str, int]:
    """Bytes that a layer exchanges, in float32."""
    architecture = ARCHITECTURES[job.model]
    settings = resolve(settings_of(architecture, job.attention), "gpt2" if architecture.is_causal else "bert")
    sizes = {
        "rows": batch,
        "heads": architecture.heads,
        "head_dim": architecture.width // architecture.heads,
        "length": job.tokens // strategy.context,
        "window_size": settings.window_size,
        "overlap_window": settings.overlap_window,
        "learned": settings.learned,
    }
    if job.attention == "eva" and not architecture.is_causal:
        return eva_traffic(**sizes, processes=strategy.context, rank=1, num_chunks=settings.num_chunks)
    own = {"chunk_size": settings.chunk_size} if job.attention == "eva" else {"slots": settings.num_features}
    layer = SharedLayer(kind=job.attention, is_causal=architecture.is_causal, **sizes, **own)
    return expected_traffic(layer, strategy.context)


def with_rows(job: Job, tokens_per_step: int) -> Job:
    return replace(job, rows=max(1, tokens_per_step // job.tokens))
