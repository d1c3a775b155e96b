"""Long sequences on many GPUs: memory, communication and time of a training step, on paper.

    python experiments/scaling.py plan --out results/scaling.json      # tables of docs/clusters.md
    python experiments/scaling.py check --out results/scaling_check.json   # of what can be run on this machine

`plan` counts what a layer costs in the code that runs, without weights (`scaling_parts/layer_costs.py`), and computes
steps of about two million tokens for the strategies that the recipes have configs for. It prints the simplest that
fits into a GPU and is nearly the fastest. Its assumptions about GPUs are arguments; no cluster was used. `check`
compares the same arithmetic with steps on a CPU: activations, time and bytes exchanged.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import shared
import typer
from scaling_parts.checks import check_memory, check_time, check_traffic
from scaling_parts.cluster import SETTINGS, Job, Machine, Step, best_step, with_rows
from scaling_parts.layer_costs import ARCHITECTURES

from hf_linattn.bench.environment import write_experiment

app = typer.Typer(add_completion=False, help=(__doc__ or "").split("\n\n")[0])
DEFAULT = Machine()
RECIPES = {"gpt2-medium": "language_modeling"}


@app.callback()
def start() -> None:
    shared.quiet()
    warnings.filterwarnings("ignore", category=FutureWarning)


@app.command()
def plan(
    models: Annotated[str, typer.Option(help="Of " + ", ".join(ARCHITECTURES))] = ",".join(ARCHITECTURES),
    attentions: Annotated[str, typer.Option(help="Of " + ", ".join(SETTINGS))] = ",".join(SETTINGS),
    tokens: Annotated[str, typer.Option(help="Of a sequence.")] = "4096,16384,65536",
    gpus: Annotated[str, typer.Option(help="How many.")] = "8,64,512",
    tokens_per_step: Annotated[int, typer.Option(min=1, help="Of all sequences of a step.")] = 2**21,
    total: Annotated[float, typer.Option(min=0, help="Tokens of the whole training.")] = 1e10,
    peak: Annotated[float, typer.Option(help="bfloat16 operations per second of a GPU.")] = DEFAULT.peak,
    attained: Annotated[float, typer.Option(min=0, max=1, help="The share of it that is reached.")] = DEFAULT.attained,
    bandwidth: Annotated[float, typer.Option(help="Bytes/s of its memory.")] = DEFAULT.bandwidth,
    memory: Annotated[float, typer.Option(help="Bytes of a GPU.")] = DEFAULT.memory,
    per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = DEFAULT.per_node,
    node_bandwidth: Annotated[float, typer.Option(help="Bytes/s within a node.")] = DEFAULT.node_bandwidth,
    network_bandwidth: Annotated[float, typer.Option(help="Bytes/s of a GPU to others.")] = DEFAULT.network_bandwidth,
    latency: Annotated[float, typer.Option(help="Seconds per collective.")] = DEFAULT.latency,
    out: Annotated[Path | None, typer.Option(help="JSON of the results.")] = None,
) -> None:
    """Print how to split a step of every model, length and attention on every number of GPUs."""
    machine = Machine(
        peak=peak,
        attained=attained,
        bandwidth=bandwidth,
        memory=memory,
        per_node=per_node,
        node_bandwidth=node_bandwidth,
        network_bandwidth=network_bandwidth,
        latency=latency,
    )
    rows = []
    for model in models.split(","):
        for length in map(int, tokens.split(",")):
            for count in map(int, gpus.split(",")):
                for attention in attentions.split(","):
                    job = with_rows(Job(model, attention, length, count, 1), tokens_per_step)
                    rows.append(describe(job, best_step(job, machine), total))
    shared.print_table("steps", rows)
    if out is not None:
        write_experiment(out, {"machine": asdict(machine), "tokens per step": tokens_per_step, "rows": rows})


def describe(job: Job, step: Step | None, total: float) -> dict[str, Any]:
    """A job and its step as a row of the table. GB are 10^9 bytes of one GPU."""
    found: dict[str, Any] = {
        "model": job.model,
        "recipe": RECIPES.get(job.model, "text_classification"),
        "attention": job.attention,
        "tokens": job.tokens,
        "GPUs": job.gpus,
        "config": "does not fit",
    }
    if step is None:
        return found
    return found | {
        "config": step.strategy.config,
        "GPUs that share a row": step.strategy.context,
        "checkpointing": step.strategy.checkpointing,
        "GPUs used": step.used,
        "rows of a batch": step.batch,
        "memory GB": step.memory / 1e9,
        "received GB": step.received / 1e9,
        "seconds": step.seconds,
        "waiting": step.waiting / step.seconds,
        "hours": total / (job.rows * job.tokens) * step.seconds / 3600,
    }


def markdown(results: dict[str, Any]) -> list[str]:
    """The table of docs/clusters.md."""
    attentions = list(dict.fromkeys(row["attention"] for row in results["rows"]))
    lines = [["model, recipe", "tokens", "GPUs", *attentions], ["---"] * (3 + len(attentions))]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in results["rows"]:
        key = f"{row['model']}, `{row['recipe']}`", f"{row['tokens']:,}", str(row["GPUs"])
        cells.setdefault(key, {})[row["attention"]] = _cell(row)
    lines += [[*key, *(found.get(attention, "") for attention in attentions)] for key, found in cells.items()]
    return ["\n".join(f"| {' | '.join(line)} |" for line in lines)]


def _cell(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return row["config"]
    shared_by = f" / {row['GPUs that share a row']}" if row["GPUs that share a row"] > 1 else ""
    idle = f", {row['GPUs used']} used" if row["GPUs used"] < row["GPUs"] else ""
    again = ", ckpt" if row["checkpointing"] else ""
    size, time, hours = f"{row['memory GB']:.0f} GB", f"{row['seconds']:.2f} s", f"{row['hours']:.1f} h"
    return f"`{row['config']}`{shared_by}{again}{idle}: {size}, {time}, {hours}"


@app.command()
def table(results: Annotated[Path, typer.Argument(exists=True, help="What `plan` wrote.")]) -> None:
    """Print the table of docs/clusters.md."""
    print(*markdown(json.loads(results.read_text())), sep="\n\n")


@app.command()
def check(
    seconds: Annotated[float, typer.Option(help="Timing of all models of a length.")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="JSON of the results.")] = None,
) -> None:
    """Compare the arithmetic with steps of a small BERT on this CPU."""
    found = {"memory": check_memory(), "time": check_time(seconds), "traffic": check_traffic()}
    for title, rows in found.items():
        shared.print_table(title, rows)
    if out is not None:
        write_experiment(out, found)


if __name__ == "__main__":
    app()
