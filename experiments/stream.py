"""Does a process that reads a long stream through one cache grow? Resident memory and bytes of the cache.

    python experiments/stream.py --kind favor_plus                   # 100000 tokens, scored in pieces of 512
    python experiments/stream.py --kind lara --generate 5000         # and then 5000 tokens one by one
    python experiments/stream.py --kind eva                          # summaries grow; eva-bounded does not
    python experiments/stream.py --kind softmax                      # for comparison
    python experiments/stream.py --kind favor_sharp --model gpt2-checkpoint --text book.txt

The exit status is 1 if a kind with a constant state grew: its resident memory between a tenth of the stream and its
end by more than `--allow` MiB, or its cache at all. Linux only. The process starts itself again with an allocator
that gives large blocks back at once, so that resident memory is what is held.
"""

from __future__ import annotations

import json
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
from rich.table import Table
from torch import Tensor

import hf_linattn
from hf_linattn.bench.environment import describe
from hf_linattn.bench.generation import held_bytes
from hf_linattn.bench.memory import CHILD_ENVIRONMENT, RESET, STATUS
from hf_linattn.integrations.seams import cache_argument

SOFTMAX = "softmax"
MIB = 2**20
ROWS = 12  # of a table
console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Sample:
    """State of the process after some tokens.

    Args:
        tokens: Read so far.
        resident, peak: Bytes of resident memory now, and at most since the last sample.
        cache: Bytes of all layers' states.
        seconds: Since the last sample.
        loss: Mean loss of the tokens since the last sample; `None` for tokens that were generated.
    """

    tokens: int
    resident: int
    peak: int
    cache: int
    seconds: float
    loss: float | None = None


def memory(field: str) -> int:
    """A field of `/proc/self/status` in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def observe(model: Any, cache: Any, tokens: int, start: float, loss: float | None = None) -> Sample:
    """A sample; the high-water mark starts anew."""
    found = Sample(
        tokens,
        memory("VmRSS"),
        memory("VmHWM"),
        held_bytes(*cache.layers, model=model),
        time.perf_counter() - start,
        loss,
    )
    RESET.write_text("5")
    return found


@torch.inference_mode()
def score(model: Any, cache: Any, ids: Tensor, piece: int) -> list[Sample]:
    """Read a stream `[tokens]` piece by piece; every token but the first has a loss."""
    samples: list[Sample] = []
    given = {cache_argument(model): cache}
    last: Tensor | None = None  # logits of the last token read, which predict the next piece's first
    read = 0
    RESET.write_text("5")
    for part in ids.split(piece):
        start = time.perf_counter()
        logits = model(input_ids=part[None], use_cache=True, **given).logits[0]
        before = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
        wanted = part[1:] if last is None else part
        loss = float(torch.nn.functional.cross_entropy(before.float(), wanted)) if len(wanted) else None
        last = logits[-1:].clone()
        read += len(part)
        del logits, before
        samples.append(observe(model, cache, read, start, loss))
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
    return {
        "resident": round(statistics.median(s.resident for s in late) - statistics.median(s.resident for s in early)),
        "peak": round(statistics.median(s.peak for s in late) - statistics.median(s.peak for s in early)),
        "cache": max(grown or [late[-1].cache - early[-1].cache]),
    }


def failures(kind: str, found: dict[str, int], allow: float) -> list[str]:
    """Why a kind whose state is constant fails, if it does."""
    if kind not in causal_lm.CONSTANT:
        return []
    wrong = [
        f"{name} memory grew by {found[name] / MIB:.1f} MiB (allowed: {allow:g})"
        for name in ("resident", "peak")
        if found[name] > allow * MIB
    ]
    return wrong + ([f"the cache grew by {found['cache']} bytes"] if found["cache"] > 0 else [])


def table(title: str, samples: list[Sample]) -> Table:
    made = Table(title=title, title_justify="left")
    for name in ("tokens", "resident MiB", "peak MiB", "cache KiB", "tokens/s", "perplexity"):
        made.add_column(name, justify="right")
    step = max(1, -(-len(samples) // ROWS))
    shown = sorted({0, *range(step - 1, len(samples), step), len(samples) - 1})
    for index in shown:
        sample = samples[index]
        count = sample.tokens - (samples[index - 1].tokens if index else 0)
        rate = f"{count / sample.seconds:.0f}" if index else ""
        perplexity = "" if sample.loss is None else f"{torch.tensor(sample.loss).exp():.1f}"
        made.add_row(
            str(sample.tokens),
            f"{sample.resident / MIB:.1f}",
            f"{sample.peak / MIB:.1f}",
            f"{sample.cache / 1024:.0f}",
            rate,
            perplexity,
        )
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
    kind: Annotated[str, typer.Option(help=f"{', '.join(causal_lm.KINDS)} or {SOFTMAX}.")] = "favor_plus",
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
    if kind not in (*causal_lm.KINDS, SOFTMAX):
        raise typer.BadParameter(f"--kind must be one of {[*causal_lm.KINDS, SOFTMAX]}; got {kind!r}.")
    causal_lm.quiet()
    torch.set_num_threads(1)
    network = causal_lm.load(model, layers, tokens + generate_tokens)
    ids = stream(model, text or [], tokens, network.config.vocab_size)
    if kind != SOFTMAX:
        hf_linattn.convert(network, causal_lm.settings(kind, max_chunks))
        causal_lm.ready(network, ids[: min(1024, tokens)][None])
    window = 1 if kind == SOFTMAX else network.config.linear_attention["window_size"]
    cache = transformers.DynamicCache(config=network.config)
    parts = {"scored in pieces": score(network, cache, ids, piece)}
    start = {"scored in pieces": tokens // 10}
    if generate_tokens:
        every = window * max(1, generate_tokens // (40 * window))
        parts["token by token"] = generate(network, cache, generate_tokens, tokens, every)
        start["token by token"] = tokens + generate_tokens // 10
    wrong: list[str] = []
    found = {name: growth(samples, start[name], window) for name, samples in parts.items()}
    for name, samples in parts.items():
        console.print(table(f"{kind}, {name}", samples))
        grown = ", ".join(f"{what} {number / MIB:+.2f} MiB" for what, number in found[name].items())
        console.print(f"from {start[name]} tokens to {samples[-1].tokens}: {grown}", highlight=False)
        wrong += [f"{name}: {reason}" for reason in failures(kind, found[name], allow)]
    if out is not None:
        content = {
            "schema": 1,
            "command": " ".join(["experiments/stream.py", *sys.argv[1:]]),
            **describe(),
            "kind": kind,
            "settings": getattr(network.config, "linear_attention", None),
            "growth": found,
            "samples": {name: [asdict(sample) for sample in samples] for name, samples in parts.items()},
            "failures": wrong,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for reason in wrong:
        console.print(f"[red]{kind}: {reason}[/]")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in CHILD_ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **CHILD_ENVIRONMENT})
    typer.run(main)
