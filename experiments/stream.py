"""Does a process that reads a long stream through one cache grow? Resident memory and bytes of the cache.

    python experiments/stream.py --kind favor_plus                   # 100000 tokens in pieces of 512
    python experiments/stream.py --kind lara --generate 5000         # and then 5000 tokens one by one
    python experiments/stream.py --kind eva                          # summaries grow; eva-bounded does not
    python experiments/stream.py --kind favor_sharp --model gpt2-checkpoint --text book.txt

The exit status is 1 if a kind with a constant state grew: its resident memory between a tenth of the stream and its
end by more than `--allow` MiB, or its cache at all. Linux only.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import transformers
import typer
from torch import Tensor

from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.generation import held_bytes
from hf_linattn.bench.memory import give_back_large_blocks, resident_bytes
from hf_linattn.integrations.seams import cache_argument

MIB = 2**20
SHOWN = 12  # lines of the table
CONSTANT = tuple(kind for kind in shared.CAUSAL_KINDS if kind != "eva")  # whose state does not grow with the text
Sample = dict[str, Any]


@torch.inference_mode()
def read(model: Any, cache: Any, ids: Tensor, piece: int, every: int) -> list[Sample]:
    """Read `[tokens]` piece by piece, with a sample of what is held after every so many of them."""
    given = {cache_argument(model): cache}
    samples, start = [], time.perf_counter()
    for number, part in enumerate(ids.split(piece), start=1):
        model(input_ids=part[None], use_cache=True, **given)
        if number * piece % every == 0:
            sizes = {"resident": resident_bytes(), "cache": held_bytes(*cache.layers, model=model)}
            samples.append({"tokens": cache.get_seq_length(), **sizes, "seconds": time.perf_counter() - start})
            start = time.perf_counter()
    return samples


def growth(samples: list[Sample]) -> dict[str, float]:
    """Bytes by which the last tenth of the samples is above the second tenth: medians of what is resident, and the
    largest caches."""
    tenth = max(1, len(samples) // 10)
    early, late = samples[tenth : 2 * tenth] or samples, samples[-tenth:]
    sizes = {"resident": statistics.median, "cache": max}
    return {name: float(most(s[name] for s in late) - most(s[name] for s in early)) for name, most in sizes.items()}


def failures(kind: str, found: dict[str, float], allow: float) -> list[str]:
    """Why a kind whose state is constant fails, if it does."""
    limits = {"resident": allow * MIB, "cache": 0} if kind in CONSTANT else {}
    return [f"{name} grew by {found[name] / MIB:.3f} MiB" for name, most in limits.items() if found[name] > most]


def stream(path: Path | None, text: list[Path], count: int, vocabulary: int) -> Tensor:
    """Tokens to read: of texts, repeated as often as it takes, or random ones."""
    if not text:
        return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(1))
    if path is None:
        raise typer.BadParameter("--text needs the tokenizer of a checkpoint: give --model too.")
    ids = shared.read_tokens(transformers.AutoTokenizer.from_pretrained(path), text)
    return ids.repeat(-(-count // max(1, len(ids))))[:count]


def main(
    kind: Annotated[str, typer.Option(help=f"{', '.join(shared.CAUSAL_KINDS)} or softmax.")] = "favor_plus",
    tokens: Annotated[int, typer.Option(min=64, help="Length of the stream.")] = 100_000,
    piece: Annotated[int, typer.Option(min=1, help="Tokens per call.")] = 512,
    generate: Annotated[int, typer.Option(min=0, help="Then read so many more, one by one.")] = 0,
    model: Annotated[Path | None, typer.Option(help="A GPT-2 checkpoint; a small random one by default.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Texts to read, repeated; random tokens by default.")] = None,
    max_chunks: Annotated[int, typer.Option(min=1, help="Summaries of eva-bounded.")] = 64,
    allow: Annotated[float, typer.Option(help="MiB of growth that are no failure.")] = 4.0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Read the stream and print what the process held."""
    if kind not in (kinds := [*shared.CAUSAL_KINDS, "softmax"]):
        raise typer.BadParameter(f"--kind must be one of {kinds}; got {kind!r}.")
    give_back_large_blocks()
    network = shared.decoder(model, tokens + generate)
    ids = stream(model, text or [], tokens + generate, network.config.vocab_size)
    window = 1
    if kind != "softmax":
        settings = shared.causal_settings(kind, max_chunks)
        network = shared.converted(network, settings, [{"input_ids": ids[None, : min(1024, tokens)]}])
        window = network.config.linear_attention["window_size"]
    cache = transformers.DynamicCache(config=network.config)
    parts = {"in pieces": read(network, cache, ids[:tokens], piece, piece)}
    if generate:
        parts["one by one"] = read(network, cache, ids[tokens:], 1, window)  # equally far into the window each time
    found = {name: growth(samples) for name, samples in parts.items()}
    wrong = [f"{name}: {reason}" for name in parts for reason in failures(kind, found[name], allow)]
    for name, samples in parts.items():
        grown = ", ".join(f"{what} {number / MIB:+.2f} MiB" for what, number in found[name].items())
        shown = samples[:: -max(1, len(samples) // SHOWN)][::-1]
        shared.print_table(f"{kind}, {name}, bytes", shown, f"from a tenth to the end: {grown}")
    if out is not None:
        write_experiment(out, {"kind": kind, "growth": found, "samples": parts, "failures": wrong})
    for reason in wrong:
        typer.echo(f"failed: {kind}, {reason}", err=True)
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
