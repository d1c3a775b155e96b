"""Does a converted GPT-2 say the same through its cache as without it? After a short recovery, on real text.

    python experiments/generation_fidelity.py --model gpt2-checkpoint --train a.parquet --eval b.parquet
    python experiments/generation_fidelity.py ... --steps 150 --checkpoints recovered --out results.json

Per kind: perplexity in windows of 1024 tokens without a cache, through the cache in pieces of 1 to 300 tokens, and
token by token (fewer windows), which must not differ by more than 1e-4; in bfloat16 the share of positions at which
the most likely token, read token by token, is that of the parallel form (at least 99 %); and greedy generation with
the cache against recomputing everything, token for token. The exit status is 1 if one of these fails.
Texts are text files or parquet files with a column `text`. With `--checkpoints` recovered models are kept; those that
are there already are used as they are, whatever the other options say.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import causal_lm
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

import hf_linattn
from hf_linattn.bench.environment import describe
from hf_linattn.integrations.seams import cache_argument

SOFTMAX = "softmax"
LENGTH = 1024
LONGEST_PIECE = 300
TOLERANCE = 1e-4  # of a perplexity
AGREEMENT = 0.99
PROMPT, NEW = 150, 200
RATE, WARM_UP, DECAY = 3e-4, 10, 0.01
console = Console(width=None if sys.stdout.isatty() else 140)


# -- recovery ---------------------------------------------------------------------------------------------------------
def recover(model: Any, ids: Tensor, steps: int, *, batch: int, length: int, seed: int = 0) -> float:
    """Train a model on rows from random places of a text; the causal language-model loss and nothing else.

    Returns: The mean loss of the last tenth of the steps; NaN without steps.
    """
    if steps < 1:
        return math.nan
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, min(WARM_UP, steps // 2), steps)
    losses = []
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(ids) - length + 1, (batch,), generator=generator).tolist()
        rows = torch.stack([ids[start : start + length] for start in starts])
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


# -- reading ----------------------------------------------------------------------------------------------------------
def pieces(total: int, generator: torch.Generator) -> list[int]:
    """Sizes from 1 to 300 that add up to `total`; every fourth is a single token."""
    found: list[int] = []
    while total:
        size = 1 if len(found) % 4 == 3 else int(torch.randint(1, LONGEST_PIECE + 1, (1,), generator=generator))
        found.append(min(size, total))
        total -= found[-1]
    return found


def read(model: Any, row: Tensor, sizes: list[int]) -> Tensor:
    """Logits `[tokens, vocabulary]` of a row of tokens read through one cache, `sizes` tokens at a time."""
    cache = transformers.DynamicCache(config=model.config)
    given = {cache_argument(model): cache}
    parts = [model(input_ids=part[None], use_cache=True, **given).logits[0] for part in row.split(sizes)]
    return torch.cat(parts)


def whole(model: Any, row: Tensor) -> Tensor:
    """The same without a cache."""
    logits: Tensor = model(input_ids=row[None], use_cache=False).logits[0]
    return logits


def losses(logits: Tensor, row: Tensor) -> Tensor:
    """Loss of every token of a row but the first, in float64."""
    return cross_entropy(logits[:-1].double(), row[1:], reduction="none")


@torch.inference_mode()
def perplexities(model: Any, rows: Tensor, single: int) -> dict[str, Any]:
    """Perplexity without a cache and through it, of the same rows.

    Args:
        rows: `[windows, tokens]`.
        single: How many of the rows to read token by token; that difference is on these rows.
    """
    generator = torch.Generator().manual_seed(0)
    plain: list[Tensor] = []
    cached: list[Tensor] = []
    steps: list[Tensor] = []
    largest = 0.0
    for index, row in enumerate(rows):
        logits = whole(model, row)
        plain.append(losses(logits, row))
        found = read(model, row, pieces(len(row), generator))
        cached.append(losses(found, row))
        largest = max(largest, float((found - logits).abs().max()))
        if index < single:
            found = read(model, row, [1] * len(row))
            steps.append(losses(found, row))
            largest = max(largest, float((found - logits).abs().max()))

    def perplexity(parts: list[Tensor]) -> float:
        return float(torch.cat(parts).mean().exp())

    return {
        "perplexity": perplexity(plain),
        "in_pieces": perplexity(cached),
        "difference_in_pieces": abs(perplexity(cached) - perplexity(plain)),
        "token_by_token": perplexity(steps) if steps else None,
        "difference_token_by_token": abs(perplexity(steps) - perplexity(plain[: len(steps)])) if steps else None,
        "largest_logit_difference": largest,
    }


@torch.inference_mode()
def agreement(model: Any, rows: Tensor) -> dict[str, float]:
    """Share of positions at which the most likely token is the same token by token and in the parallel form.

    Returns: Also the same for a float32 copy of the model in parallel form, beside the model's own parallel form: how
        much of the disagreement is the precision's.
    """
    reference = copy.deepcopy(model).float()
    same, exact, count = 0, 0, 0
    for row in rows:
        parallel = whole(model, row).argmax(-1)
        same += int((read(model, row, [1] * len(row)).argmax(-1) == parallel).sum())
        exact += int((whole(reference, row).argmax(-1) == parallel).sum())
        count += len(row)
    return {"bfloat16_agreement": same / count, "bfloat16_agreement_with_float32": exact / count}


@torch.inference_mode()
def greedy(model: Any, rows: Tensor) -> dict[str, Any]:
    """How many tokens generated with the cache are, up to the first other one, those of recomputing everything."""
    equal, distinct = [], []
    with causal_lm.without_end(model):
        for row in rows:
            prompt = row[None, :PROMPT]
            options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
            mask = torch.ones_like(prompt)
            cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)[0, PROMPT:]
            again = model.generate(prompt, attention_mask=mask, use_cache=False, **options)[0, PROMPT:]
            different = (cached != again).nonzero()
            equal.append(int(different[0]) if len(different) else len(cached))
            distinct.append(len(cached.unique()))  # a text that repeats itself proves less
    return {"greedy_equal": equal, "greedy_distinct": distinct, "greedy_tokens": NEW}


def failures(row: dict[str, Any]) -> list[str]:
    """What a row misses."""
    found = []
    for name in ("difference_in_pieces", "difference_token_by_token"):
        if row[name] is not None and not row[name] <= TOLERANCE:
            found.append(f"{name} is {row[name]:.1e}, more than {TOLERANCE:g}")
    if not row["bfloat16_agreement"] >= AGREEMENT:
        found.append(f"bfloat16_agreement is {row['bfloat16_agreement']:.4f}, less than {AGREEMENT:g}")
    if any(count < row["greedy_tokens"] for count in row["greedy_equal"]):
        found.append(f"greedy generation is equal for {row['greedy_equal']} of {row['greedy_tokens']} tokens")
    return found


# -- the script -------------------------------------------------------------------------------------------------------
def recovered(kind: str, stock: Any, ids: Tensor, options: dict[str, Any], folder: Path | None) -> tuple[Any, float]:
    """A model of a kind after calibration and recovery, read from a folder if it has been made before."""
    place = folder / kind if folder is not None else None
    if place is not None and (place / "config.json").exists():
        return hf_linattn.LinAttnGPT2LMHeadModel.from_pretrained(place).eval(), math.nan
    model = hf_linattn.convert(stock, causal_lm.settings(kind, options["max_chunks"]), copy=True)
    causal_lm.ready(model, causal_lm.windows(ids, options["length"], 16))
    loss = recover(model, ids, options["steps"], batch=options["batch"], length=options["length"])
    if place is not None:
        model.save_pretrained(place)
    return model.eval(), loss


def measured(model: Any, ids: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Everything about one model."""
    rows = causal_lm.windows(ids, options["window"], options["windows"])
    single = rows[: options["single"]]
    found = perplexities(model, rows, len(single))
    prompts = causal_lm.windows(ids, PROMPT, options["prompts"])
    found |= greedy(model, prompts)
    return found | agreement(copy.deepcopy(model).to(torch.bfloat16), single)


def run(
    stock: Any, train: Tensor, text: Tensor, kinds: list[str], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row per kind; softmax with its own cache first, for comparison."""
    for kind in [SOFTMAX, *kinds]:
        start = time.perf_counter()
        model, loss = stock, math.nan
        if kind != SOFTMAX:
            model, loss = recovered(kind, stock, train, options, options["checkpoints"])
        trained = time.perf_counter()
        found = measured(model, text, options)
        seconds = {"recovery_seconds": trained - start, "seconds": time.perf_counter() - trained}
        yield {"kind": kind, "loss": None if math.isnan(loss) else loss, **found, **seconds}


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="With the cache and without", title_justify="left")
    names = ["", "perplexity", "in pieces", "token by token", "bf16 argmax", "(bf16 = fp32)"]
    names += ["greedy equal", "distinct", "seconds"]
    for name in names:
        made.add_column(name, justify="left" if not name else "right")
    for row in rows:
        single = row["difference_token_by_token"]
        made.add_row(
            row["kind"],
            f"{row['perplexity']:.4f}",
            f"{row['difference_in_pieces']:.1e}",
            "" if single is None else f"{single:.1e}",
            f"{row['bfloat16_agreement']:.2%}",
            f"{row['bfloat16_agreement_with_float32']:.2%}",
            f"{sum(row['greedy_equal'])} / {len(row['greedy_equal']) * row['greedy_tokens']}",
            "/".join(map(str, row["greedy_distinct"])),
            f"{row['recovery_seconds']:.0f} + {row['seconds']:.0f}",
        )
    return made


def main(
    model: Annotated[Path, typer.Option(exists=True, help="A GPT-2 checkpoint with its tokenizer.")],
    train: Annotated[list[Path], typer.Option(exists=True, help="Texts for calibration and recovery.")],
    evaluation: Annotated[list[Path], typer.Option("--eval", exists=True, help="Other texts.")],
    kinds: Annotated[str, typer.Option(help="Kinds, separated by commas.")] = ",".join(causal_lm.KINDS),
    steps: Annotated[int, typer.Option(min=0, help="Steps of recovery; 0 for none.")] = 150,
    batch: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens per row of recovery.")] = 256,
    window: Annotated[int, typer.Option(min=2, help="Tokens per row of evaluation.")] = LENGTH,
    windows: Annotated[int, typer.Option(min=1, help="Rows of evaluation.")] = 16,
    single: Annotated[int, typer.Option(min=1, help="Rows read token by token.")] = 2,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to generate from.")] = 2,
    max_chunks: Annotated[
        int, typer.Option(min=1, help="Summaries of eva-bounded; few, so that some of a window's are merged.")
    ] = 16,
    checkpoints: Annotated[Path | None, typer.Option(help="Keep recovered models here, and use those found.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print the table."""
    chosen = [kind.strip() for kind in kinds.split(",") if kind.strip()]
    if unknown := [kind for kind in chosen if kind not in causal_lm.KINDS]:
        raise typer.BadParameter(f"--kinds must be of {list(causal_lm.KINDS)}; got {unknown}.")
    causal_lm.quiet()
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    stock = causal_lm.load(model, positions=max(window, length, PROMPT + NEW))
    options = {
        "steps": steps,
        "batch": batch,
        "length": length,
        "window": window,
        "windows": windows,
        "single": single,
        "prompts": prompts,
        "max_chunks": max_chunks,
        "checkpoints": checkpoints,
    }
    rows = []
    texts = causal_lm.tokens(tokenizer, train), causal_lm.tokens(tokenizer, evaluation)
    for row in run(stock, *texts, chosen, options):
        rows.append({**row, "failures": failures(row) if row["kind"] != SOFTMAX else []})
        console.print(f"{row['kind']}: {'; '.join(rows[-1]['failures']) or 'done'}", highlight=False)
        if out is not None:
            names = {**options, "model": model.name, "checkpoints": None}
            content = {"schema": 1, "options": names, **describe(), "rows": rows}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(table(rows))
    sys.exit(1 if any(row["failures"] for row in rows) else 0)


if __name__ == "__main__":
    typer.run(main)
