"""How much memory does a process need for a training step of one layer, when processes share the sequence?

    python experiments/sequence_parallel_memory.py                                 # 16384 tokens on 1, 2, 4 processes
    python experiments/sequence_parallel_memory.py --kinds lara --tokens 65536

The most that any of the processes held beyond its queries, keys and values, forward and backward, and what it received
from the others. Processes of one machine, on the CPU; Linux only. The exit status is 1 if twice the processes need
more than 0.75 of the memory.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer

import hf_linattn
from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.memory import give_back_free_memory, peak_bytes
from hf_linattn.distributed.collectives import SequenceGroup
from hf_linattn.distributed.layers import attend_across
from hf_linattn.modules.contract import AttentionInputs, LayerShape
from hf_linattn.modules.registry import get_kind

MIB, KIB = 2**20, 2**10
HEADS, HEAD_DIM = 4, 64


def make_layer(kind: str, is_causal: bool) -> Any:
    """With the defaults of a text model; calibrated on random tokens where statistics are needed."""
    record = get_kind(kind)
    settings = {"proposal_source": "calibrated"} if kind == "lara" else {}
    layer = record.module_cls(record.config_cls(**settings), LayerShape(HEADS, HEAD_DIM, 0, is_causal))
    calibration = layer.new_calibration()
    if calibration is not None:
        z = torch.randn(3, 1, HEADS, 1024, HEAD_DIM, generator=torch.Generator().manual_seed(0))
        calibration.update(AttentionInputs(z[0], z[1], z[2], None, HEAD_DIM**-0.5, is_causal))
        layer.set_tensors(calibration.result())
    return layer


def measure(rank: int, count: int, layer: Any, tokens: int, folder: str, answers: Any) -> None:
    """One process: bytes held at most in a step, and bytes received in it."""
    torch.set_num_threads(1)
    give_back_free_memory()  # before the first step, so that no step leaves holes that the next one fills in part
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    assert dist.group.WORLD is not None
    group = SequenceGroup(dist.group.WORLD)
    layer.sequence_parallel = lambda layer, inputs: attend_across(layer, inputs, group)
    part = [torch.randn(1, HEADS, tokens // count, HEAD_DIM, requires_grad=True) for _ in range(3)]

    def step() -> None:
        layer(*part).sum().backward()
        for z in part:
            z.grad = None

    step()  # what is made once is not part of a step
    group.traffic.received.clear()
    peak = peak_bytes(step)
    answers.put((peak, sum(group.traffic.received.values())))
    dist.barrier()
    dist.destroy_process_group()


def run(kind: str, is_causal: bool, tokens: int, count: int) -> dict[str, Any]:
    """All processes: the most that one of them held and received."""
    answers, layer = mp.get_context("fork").SimpleQueue(), make_layer(kind, is_causal)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(measure, (count, layer, tokens, folder, answers), count, start_method="fork")
    peaks, received = zip(*[answers.get() for _ in range(count)], strict=True)
    return {
        "kind": kind,
        "direction": "causal" if is_causal else "bidirectional",
        "processes": count,
        "tokens of each": tokens // count,
        "peak MiB": max(peaks) / MIB,
        "received KiB": max(received) / KIB,
    }


def main(
    kinds: Annotated[str, typer.Option(help="Kinds, separated by commas.")] = "favor_plus,eva",
    tokens: Annotated[int, typer.Option(min=128, help="Of the sequence.")] = 16384,
    processes: Annotated[str, typer.Option(help="How many, separated by commas.")] = "1,2,4",
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print a table."""
    names = [name.strip() for name in kinds.split(",")]
    if unknown := set(names) - set(hf_linattn.list_kinds()):
        sys.exit(f"error: kinds must be of {hf_linattn.list_kinds()}; got {sorted(unknown)}.")
    rows = []
    for kind in names:
        for is_causal in (False, True):
            found = [run(kind, is_causal, tokens, int(count)) for count in processes.split(",")]
            rows += [{**row, "of one": row["peak MiB"] / found[0]["peak MiB"]} for row in found]
    shared.print_table(f"A training step of one layer, {HEADS} heads of {HEAD_DIM}, {tokens} tokens", rows)
    if out is not None:
        write_experiment(out, {"rows": rows})
    wrong = [
        (few, many)
        for few, many in zip(rows, rows[1:], strict=False)
        if many["processes"] >= 2 * few["processes"] and many["peak MiB"] > 0.75 * few["peak MiB"]
    ]
    sys.exit(f"failed: {wrong}" if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
