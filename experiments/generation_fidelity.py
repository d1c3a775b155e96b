"""Does a converted GPT-2 say the same through its cache as without it? After a short recovery, on real text.

    python experiments/generation_fidelity.py --model gpt2-checkpoint --train a.parquet --eval b.parquet
    python experiments/generation_fidelity.py ... --steps 0 --kinds favor_plus --out results.json

Per kind: perplexity in windows of 1024 tokens without a cache, through the cache in pieces of 1 to 300 tokens, and
token by token (fewer windows), which must not differ by more than 1e-4; in bfloat16 the share of positions at which
the most likely token, read token by token, is that of the parallel form (at least 99 %); and greedy generation with
the cache against recomputing everything, token for token. The exit status is 1 if one of these fails.
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
def perplexities(model: Any, rows: Tensor, single: int) -> dict[str, Any]:
    """Of rows `[windows, tokens]`; and how it differs in pieces, and of the first `single` rows token by token."""

    def perplexity(rows: Tensor, sizes: list[int] | None = None) -> float:
        losses = [cross_entropy(read(model, row, sizes)[:-1].double(), row[1:]) for row in rows]
        return float(torch.stack(losses).mean().exp())

    whole, tokens = perplexity(rows), rows.shape[1]
    return {
        "perplexity": whole,
        "difference_in_pieces": abs(perplexity(rows, pieces(tokens)) - whole),
        "difference_token_by_token": abs(perplexity(rows[:single], [1] * tokens) - perplexity(rows[:single])),
    }


@torch.inference_mode()
def agreement(model: Any, rows: Tensor) -> dict[str, float]:
    """Share of positions at which the most likely token, read token by token, is that of the parallel form.

    Returns: Also the same for a float32 copy of the model in parallel form, beside the model's own parallel form: how
        much of the disagreement is the precision's.
    """
    reference, same, exact = copy.deepcopy(model).float(), [], []
    for row in rows:
        parallel = read(model, row).argmax(-1)
        same.append(read(model, row, [1] * len(row)).argmax(-1) == parallel)
        exact.append(read(reference, row).argmax(-1) == parallel)
    names = {"bfloat16_agreement": same, "bfloat16_agreement_with_float32": exact}
    return {name: float(torch.cat(hits).double().mean()) for name, hits in names.items()}


@torch.inference_mode()
def greedy(model: Any, prompts: Tensor) -> dict[str, Any]:
    """How many tokens generated with the cache are, up to the first other one, those of recomputing everything."""
    equal, distinct = [], []
    for row in prompts:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(row[None])
        cached, again = (model.generate(row[None], use_cache=use, **options)[0, len(row) :] for use in (True, False))
        equal.append(int((cached == again).long().cumprod(0).sum()))
        distinct.append(len(cached.unique()))  # a text that repeats itself proves less
    return {"greedy_equal": equal, "greedy_distinct": distinct}


def failures(row: dict[str, Any]) -> list[str]:
    """What a row misses."""
    held = {
        "difference_in_pieces": row["difference_in_pieces"] <= TOLERANCE,
        "difference_token_by_token": row["difference_token_by_token"] <= TOLERANCE,
        "bfloat16_agreement": row["bfloat16_agreement"] >= AGREEMENT,
        "greedy_equal": min(row["greedy_equal"]) >= NEW,
    }
    return [f"{name} is {row[name]}" for name, is_held in held.items() if not is_held]


def main(
    model: Annotated[Path, typer.Option(exists=True, help="A GPT-2 checkpoint with its tokenizer.")],
    train: Annotated[list[Path], typer.Option(exists=True, help="Texts for calibration and recovery.")],
    evaluation: Annotated[list[Path], typer.Option("--eval", exists=True, help="Other texts.")],
    kinds: Annotated[str, typer.Option(help="Kinds, separated by commas.")] = ",".join(shared.CAUSAL_KINDS),
    steps: Annotated[int, typer.Option(min=0, help="Steps of recovery; 0 for none.")] = 150,
    window: Annotated[int, typer.Option(min=2, help="Tokens per row of evaluation.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Rows of evaluation.")] = 16,
    single: Annotated[int, typer.Option(min=1, help="Rows read token by token.")] = 2,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to generate from.")] = 2,
    max_chunks: Annotated[int, typer.Option(min=1, help="Summaries of eva-bounded; few, so that some merge.")] = 16,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print the table."""
    chosen = [kind.strip() for kind in kinds.split(",") if kind.strip()]
    if unknown := [kind for kind in chosen if kind not in shared.CAUSAL_KINDS]:
        raise typer.BadParameter(f"--kinds must be of {list(shared.CAUSAL_KINDS)}; got {unknown}.")
    stock = shared.decoder(model, max(window, LENGTH, PROMPT + NEW))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    train_ids, text = (shared.read_tokens(tokenizer, paths) for paths in (train, evaluation))
    calibration = [{"input_ids": row[None]} for row in shared.rows_of(train_ids, LENGTH, 16)]
    rows, wrong = [], []
    for kind in ["softmax", *chosen]:
        network = stock
        if kind != "softmax":
            network = shared.converted(stock, shared.causal_settings(kind, max_chunks), calibration)
            recover(network, train_ids, steps)
        found = perplexities(network, shared.rows_of(text, window, windows), single)
        found |= greedy(network, shared.rows_of(text, PROMPT, prompts))
        found |= agreement(copy.deepcopy(network).to(torch.bfloat16), shared.rows_of(text, window, single))
        rows.append({"kind": kind, **found})
        wrong += [f"{kind}: {reason}" for reason in failures(found) if kind != "softmax"]
        typer.echo(f"{kind}: done")
        if out is not None:
            options = {
                "steps": steps,
                "window": window,
                "windows": windows,
                "single": single,
                "max_chunks": max_chunks,
            }
            write_experiment(out, {"options": {**options, "model": model.name}, "rows": rows, "failures": wrong})
    shared.print_table("With the cache and without", rows, f"{NEW} tokens generated greedily")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    typer.run(main)
