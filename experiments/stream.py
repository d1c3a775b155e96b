"""Does a process that reads a long stream through one cache grow? Resident memory and bytes of the cache.

    python experiments/stream.py --kind favor_plus                   # 100000 tokens, scored in pieces of 512
    python experiments/stream.py --kind lara --generate 5000         # and then 5000 tokens one by one
    python experiments/stream.py --kind eva                          # summaries grow; eva-bounded does not
    python experiments/stream.py --kind favor_sharp --model gpt2-checkpoint --text book.txt

The exit status is 1 if a kind with a constant state grew: its resident memory between a tenth of the stream and its
end by more than `--allow` MiB, or its cache at all. Linux only. The process starts itself again with an allocator
that gives large blocks back at once, so that resident memory is what is held.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import causal_lm
import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.generation import held_bytes
from hf_linattn.bench.memory import CHILD_ENVIRONMENT, high_water_bytes, reset_high_water, resident_bytes
from hf_linattn.bench.report import rich_table
from hf_linattn.integrations.seams import cache_argument

MIB = 2**20
SHOWN = 12  # lines of a table, about
PARTS = ("scored in pieces", "token by token")


@dataclass(frozen=True)
class Sample:
    """The process after some tokens: bytes held now, at most since the last sample, and by the cache's layers."""

    tokens: int
    resident: int
    peak: int
    cache: int
    seconds: float
    loss: float | None = None  # mean of the tokens since the last sample; `None` for tokens that were generated


def observe(model: Any, cache: Any, tokens: int, start: float, loss: float | None = None) -> Sample:
    """A sample; the high-water mark starts anew."""
    sizes = resident_bytes(), high_water_bytes(), held_bytes(*cache.layers, model=model)
    reset_high_water()
    return Sample(tokens, *sizes, time.perf_counter() - start, loss)


@torch.inference_mode()
def score(model: Any, cache: Any, ids: Tensor, piece: int) -> list[Sample]:
    """Read a stream `[tokens]` piece by piece; every token but the first has a loss."""
    samples: list[Sample] = []
    given = {cache_argument(model): cache}
    last = torch.empty(0, model.config.vocab_size)  # logits that predict the next piece's first token
    reset_high_water()
    for part in ids.split(piece):
        start = time.perf_counter()
        logits = torch.cat([last, model(input_ids=part[None], use_cache=True, **given).logits[0]])
        wanted = part[len(part) + 1 - len(logits) :]
        loss = float(cross_entropy(logits[:-1].float(), wanted)) if len(wanted) else None
        last = logits[-1:].clone()
        del logits
        read = samples[-1].tokens if samples else 0
        samples.append(observe(model, cache, read + len(part), start, loss))
    return samples


@torch.inference_mode()
def generate(model: Any, cache: Any, count: int, read: int, every: int) -> list[Sample]:
    """Sample tokens one by one behind what the cache has read."""
    generator = torch.Generator().manual_seed(0)
    token = torch.zeros(1, 1, dtype=torch.long)
    samples: list[Sample] = []
    given = {cache_argument(model): cache}
    start = time.perf_counter()
    for number in range(1, count + 1):
        logits = model(input_ids=token, use_cache=True, **given).logits[:, -1]
        token = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        if number % every == 0 or number == count:
            samples.append(observe(model, cache, read + number, start))
            start = time.perf_counter()
    return samples


def growth(samples: list[Sample], start: int, window: int = 1) -> dict[str, int]:
    """Bytes by which a stream grew: the medians of its last tenth over those of the tenth that begins at `start`.

    Of the cache any growth counts, between samples with equally many tokens in the current window.
    """
    span = max((samples[-1].tokens - start) // 9, 1)
    early = [s for s in samples if start <= s.tokens <= start + span] or samples[:1]
    late = [s for s in samples if s.tokens > samples[-1].tokens - span] or samples[-1:]
    phases: dict[int, int] = {}
    for sample in early:
        phase = sample.tokens % window
        phases[phase] = max(sample.cache, phases.get(phase, 0))
    grown = [s.cache - phases[s.tokens % window] for s in late if s.tokens % window in phases]
    found = {"cache": max(grown or [late[-1].cache - early[-1].cache])}
    for name in ("resident", "peak"):
        after, before = (statistics.median(getattr(s, name) for s in side) for side in (late, early))
        found[name] = round(after - before)
    return found


def failures(kind: str, found: dict[str, int], allow: float) -> list[str]:
    """Why a kind whose state is constant fails, if it does."""
    if kind not in causal_lm.CONSTANT:
        return []
    limits = {"resident": allow * MIB, "peak": allow * MIB, "cache": 0}
    return [f"{name} grew by {found[name] / MIB:.3f} MiB" for name, most in limits.items() if found[name] > most]


def lines(samples: list[Sample]) -> list[list[str]]:
    """A table of about `SHOWN` samples, the last among them."""
    made = []
    for sample in samples[:: -max(1, len(samples) // SHOWN)][::-1]:
        sizes = [f"{sample.resident / MIB:.1f}", f"{sample.peak / MIB:.1f}", f"{sample.cache / 1024:.0f}"]
        perplexity = "" if sample.loss is None else f"{math.exp(sample.loss):.1f}"
        made.append([str(sample.tokens), *sizes, f"{sample.seconds:.2f}", perplexity])
    return made


def stream(path: Path | None, text: list[Path], count: int, vocabulary: int) -> Tensor:
    """Tokens to read: of texts, repeated as often as it takes, or random ones."""
    if not text:
        return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(1))
    if path is None:
        raise typer.BadParameter("--text needs the tokenizer of a checkpoint: give --model too.")
    ids = causal_lm.tokens(transformers.AutoTokenizer.from_pretrained(path), text)
    return ids.repeat(-(-count // max(1, len(ids))))[:count]


def main(
    kind: Annotated[str, typer.Option(help=f"{', '.join(causal_lm.KINDS)} or softmax.")] = "favor_plus",
    tokens: Annotated[int, typer.Option(min=64, help="Length of the stream.")] = 100_000,
    piece: Annotated[int, typer.Option(min=1, help="Tokens per call.")] = 512,
    generate_tokens: Annotated[int, typer.Option("--generate", min=0, help="Then generate so many, one by one.")] = 0,
    model: Annotated[Path | None, typer.Option(help="A GPT-2 checkpoint; a small random one by default.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of the random one.")] = 4,
    text: Annotated[list[Path] | None, typer.Option(help="Texts to read, repeated; random tokens by default.")] = None,
    max_chunks: Annotated[int, typer.Option(min=1, help="Summaries of eva-bounded.")] = 64,
    allow: Annotated[float, typer.Option(help="MiB of growth that are no failure.")] = 4.0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Read the stream and print what the process held."""
    if kind not in (*causal_lm.KINDS, causal_lm.SOFTMAX):
        raise typer.BadParameter(f"--kind must be one of {[*causal_lm.KINDS, causal_lm.SOFTMAX]}; got {kind!r}.")
    network = causal_lm.load(model, layers, tokens + generate_tokens)
    ids = stream(model, text or [], tokens, network.config.vocab_size)
    window = 1
    if kind != causal_lm.SOFTMAX:
        network = causal_lm.converted(network, kind, ids[: min(1024, tokens)][None], max_chunks)
        window = network.config.linear_attention["window_size"]
    cache = transformers.DynamicCache(config=network.config)
    parts = {PARTS[0]: score(network, cache, ids, piece)}
    if generate_tokens:
        every = window * max(1, generate_tokens // (40 * window))
        parts[PARTS[1]] = generate(network, cache, generate_tokens, tokens, every)
    starts = {PARTS[0]: tokens // 10, PARTS[1]: tokens + generate_tokens // 10}
    found = {name: growth(samples, starts[name], window) for name, samples in parts.items()}
    wrong = [f"{name}: {reason}" for name in parts for reason in failures(kind, found[name], allow)]
    console = Console(width=None if sys.stdout.isatty() else 140)
    header = ("tokens", "resident MiB", "peak MiB", "cache KiB", "seconds", "perplexity")
    for name, samples in parts.items():
        grown = ", ".join(f"{what} {number / MIB:+.2f} MiB" for what, number in found[name].items())
        caption = f"from {starts[name]} tokens to {samples[-1].tokens}: {grown}"
        console.print(rich_table(f"{kind}, {name}", header, lines(samples), caption))
    if out is not None:
        shown = {name: [asdict(sample) for sample in samples] for name, samples in parts.items()}
        write_experiment(out, {"kind": kind, "growth": found, "samples": shown, "failures": wrong})
    for reason in wrong:
        console.print(f"[red]{kind}: {reason}[/]")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in CHILD_ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **CHILD_ENVIRONMENT})
    typer.run(main)
