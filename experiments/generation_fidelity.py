"""Does a converted GPT-2 say the same through its cache as without it? After a short recovery, on real text.

    python experiments/generation_fidelity.py --model gpt2-checkpoint --train a.parquet --eval b.parquet
    python experiments/generation_fidelity.py ... --steps 0 --kinds favor_plus --out results.json

Per kind: perplexity in windows of 1024 tokens without a cache, through the cache in pieces of 1 to 300 tokens, and
token by token (fewer windows), which must not differ by more than 1e-4; in bfloat16 the share of positions at which
the most likely token, read token by token, is that of the parallel form (at least 99 %); and greedy generation with
the cache against recomputing everything, token for token. The exit status is 1 if one of these fails for a kind.
Texts are text files or parquet files with a column `text`.
"""

from __future__ import annotations

import copy
import sys
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import transformers
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_linattn.bench.environment import write_experiment
from hf_linattn.integrations.seams import cache_argument

PIECES = (150, 1, 300, 37)  # tokens per call, again and again
TOLERANCE = 1e-4  # of a perplexity
AGREEMENT = 0.99
PROMPT, NEW = 150, 200
BATCH, LENGTH = 8, 256  # of a step of recovery
RATE = 3e-4


def recover(model: Any, ids: Tensor, steps: int) -> None:
    """Train a model on rows from random places of a text."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, min(10, steps // 2), steps)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH + 1, (BATCH,)).tolist()
        rows = torch.stack([ids[start : start + LENGTH] for start in starts])
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def pieces(total: int) -> list[int]:
    """Sizes that add up to `total`."""
    found: list[int] = []
    for size in cycle(PIECES):
        found.append(min(size, total - sum(found)))
        if sum(found) == total:
            break
    return found


def read(model: Any, row: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Logits `[tokens, vocabulary]` of a row of tokens, through one cache `sizes` tokens at a time, or without one."""
    if sizes is None:
        return model(input_ids=row[None], use_cache=False).logits[0]
    given = {cache_argument(model): transformers.DynamicCache(config=model.config)}
    return torch.cat([model(input_ids=part[None], use_cache=True, **given).logits[0] for part in row.split(sizes)])


@torch.inference_mode()
def through_cache(model: Any, rows: Tensor, sizes: list[int]) -> dict[str, float]:
    """Perplexity of rows `[windows, tokens]` without a cache; what changes when they are read through one.

    Returns: Also the share of positions at which the most likely token stays the same.
    """
    same, losses = [], []
    for row in rows:
        both = read(model, row), read(model, row, sizes)
        same.append((both[0].argmax(-1) == both[1].argmax(-1)).double())
        losses.append(torch.stack([cross_entropy(logits[:-1].double(), row[1:]) for logits in both]))
    whole, cached = torch.stack(losses).mean(0).exp().tolist()
    return {"perplexity": whole, "difference": abs(cached - whole), "same": float(torch.cat(same).mean())}


@torch.inference_mode()
def greedy(model: Any, prompts: Tensor) -> float:
    """Share of the tokens generated with the cache that are, before the first other one, those of recomputing all."""
    equal = []
    for row in prompts:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(row[None])
        cached, again = (model.generate(row[None], use_cache=use, **options)[0, len(row) :] for use in (True, False))
        equal.append((cached == again).double().cumprod(0).mean())
    return float(torch.stack(equal).mean())


def measured(model: Any, text: Tensor, window: int, windows: int, single: int) -> list[dict[str, Any]]:
    """Rows of one model: in float32 in pieces, token by token, and greedily; in bfloat16 token by token."""
    rows, steps = shared.rows_of(text, window, windows), [1] * window
    half = copy.deepcopy(model).to(torch.bfloat16)
    return [
        {"read": "in pieces", **through_cache(model, rows, pieces(window))},
        {"read": "token by token", **through_cache(model, rows[:single], steps)},
        {"read": "token by token, bfloat16", **through_cache(half, rows[:single], steps)},
        {"read": "greedily", "same": greedy(model, shared.rows_of(text, PROMPT, single))},
    ]


def is_failure(row: dict[str, Any]) -> bool:
    """Whether a row of a converted model misses what it has to reach."""
    if "bfloat16" in row["read"]:
        return not row["same"] >= AGREEMENT
    return not (row["same"] == 1 if row["read"] == "greedily" else row["difference"] <= TOLERANCE)


def main(
    model: Annotated[Path, typer.Option(exists=True, help="A GPT-2 checkpoint with its tokenizer.")],
    train: Annotated[list[Path], typer.Option(exists=True, help="Texts for calibration and recovery.")],
    evaluation: Annotated[list[Path], typer.Option("--eval", exists=True, help="Other texts.")],
    kinds: Annotated[str, typer.Option(help="Kinds, separated by commas.")] = ",".join(shared.CAUSAL_KINDS),
    steps: Annotated[int, typer.Option(min=0, help="Steps of recovery; 0 for none.")] = 150,
    window: Annotated[int, typer.Option(min=2, help="Tokens per row of evaluation.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Rows of evaluation.")] = 16,
    single: Annotated[int, typer.Option(min=1, help="Rows read token by token, and prompts.")] = 4,
    max_chunks: Annotated[int, typer.Option(min=1, help="Summaries of eva-bounded; few, so that some merge.")] = 16,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print the table."""
    stock = shared.decoder(model, max(window, LENGTH, PROMPT + NEW))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    train_ids, text = (shared.read_tokens(tokenizer, paths) for paths in (train, evaluation))
    calibration = [{"input_ids": row[None]} for row in shared.rows_of(train_ids, LENGTH, 16)]
    rows: list[dict[str, Any]] = []
    for kind in ["softmax", *shared.causal_kinds(kinds)]:
        network = stock
        if kind != "softmax":
            network = shared.converted(stock, shared.causal_settings(kind, max_chunks), calibration)
            recover(network, train_ids, steps)
        rows += [{"kind": kind, **row} for row in measured(network, text, window, windows, single)]
        typer.echo(f"{kind}: done")
    wrong = [row for row in rows if row["kind"] != "softmax" and is_failure(row)]
    if out is not None:
        options = {"steps": steps, "window": window, "windows": windows, "single": single, "max_chunks": max_chunks}
        write_experiment(out, {"options": {**options, "model": model.name}, "rows": rows, "failures": wrong})
    shared.print_table("With the cache and without", rows)
    sys.exit(f"failed: {wrong}" if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
