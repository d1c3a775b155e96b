"""Does a process that reads a long stream through one cache grow? Resident memory and bytes of the cache.

    python experiments/stream.py                                # every kind: 100000 tokens in pieces of 512
    python experiments/stream.py --kinds lara --generate 5000   # and then 5000 tokens one by one

The exit status is 1 if a kind with a constant state (all but EVA without `max_chunks`) grew: its resident memory
between a tenth of the stream and its end by more than `--allow` MiB, or its cache at all. Linux only.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import transformers
import typer
from torch import Tensor

from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.generation import held_bytes
from hf_linattn.bench.memory import give_back_free_memory, resident_bytes
from hf_linattn.integrations.seams import cache_argument

MIB = 2**20


@torch.inference_mode()
def read(model: Any, cache: Any, ids: Tensor, piece: int, every: int) -> list[tuple[int, int]]:
    """Read `[tokens]` piece by piece. Returns: Bytes resident and in the cache, after every so many tokens."""
    samples = []
    for number, part in enumerate(ids.split(piece), start=1):
        model(input_ids=part[None], use_cache=True, **{cache_argument(model): cache})
        if number * piece % every == 0:
            samples.append((resident_bytes(), held_bytes(*cache.layers, model=model)))
    return samples


def growth(samples: list[tuple[int, int]]) -> dict[str, float]:
    """MiB by which the last tenth is above the second: medians of what is resident, the largest of the caches."""
    tenth = max(1, len(samples) // 10)
    early, late = samples[tenth : 2 * tenth] or samples, samples[-tenth:]
    found = {}
    for index, (name, typical) in enumerate({"resident": statistics.median, "cache": max}.items()):
        before, after = (typical([sample[index] for sample in part]) for part in (early, late))
        found |= {f"{name} MiB": after / MIB, f"{name} grew by": (after - before) / MIB}
    return found


def is_failure(row: dict[str, Any], allow: float) -> bool:
    """Whether a kind whose state is constant grew."""
    return row["kind"] not in ("eva", "softmax") and (row["resident grew by"] > allow or row["cache grew by"] > 0)


def main(
    kinds: Annotated[str, typer.Option(help="Kinds or softmax, separated by commas.")] = ",".join(shared.CAUSAL_KINDS),
    tokens: Annotated[int, typer.Option(min=64, help="Length of the stream.")] = 100_000,
    piece: Annotated[int, typer.Option(min=1, help="Tokens per call.")] = 512,
    generate: Annotated[int, typer.Option(min=0, help="Then read so many more, one by one.")] = 0,
    model: Annotated[Path | None, typer.Option(help="A GPT-2 checkpoint; a small random one by default.")] = None,
    max_chunks: Annotated[int, typer.Option(min=1, help="Summaries of eva-bounded.")] = 64,
    allow: Annotated[float, typer.Option(help="MiB of growth that are no failure.")] = 4.0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Read random tokens and print what the process held."""
    give_back_free_memory()
    stock = shared.decoder(model, tokens + generate)
    ids = torch.randint(stock.config.vocab_size, (tokens + generate,), generator=torch.Generator().manual_seed(1))
    rows = []
    for kind in shared.causal_kinds(kinds):
        network, window = stock, 1
        if kind != "softmax":
            settings = shared.causal_settings(kind, max_chunks)
            network = shared.converted(stock, settings, [{"input_ids": ids[None, : min(1024, tokens)]}])
            window = network.config.linear_attention["window_size"]
        cache = transformers.DynamicCache(config=network.config)
        # Samples are equally far into a window each time.
        parts = {"in pieces": (ids[:tokens], piece, piece), "one by one": (ids[tokens:], 1, window)}
        for name, part in parts.items():
            if len(part[0]):
                rows.append({"kind": kind, "tokens": name, **growth(read(network, cache, *part))})
    shared.print_table(f"{tokens} tokens in pieces of {piece}, {generate} one by one", rows)
    wrong = [row for row in rows if is_failure(row, allow)]
    if out is not None:
        write_experiment(out, {"rows": rows, "failures": wrong})
    sys.exit(f"failed: {wrong}" if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
