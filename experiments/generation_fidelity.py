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
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import causal_lm
import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

import hf_linattn
from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.report import rich_table
from hf_linattn.integrations.seams import cache_argument

LONGEST_PIECE = 300
TOLERANCE = 1e-4  # of a perplexity
AGREEMENT = 0.99
PROMPT, NEW = 150, 200
RATE, WARM_UP, DECAY = 3e-4, 10, 0.01


# -- recovery ---------------------------------------------------------------------------------------------------------
def recover(model: Any, ids: Tensor, steps: int, *, batch: int, length: int, seed: int = 0) -> float:
    """Train a model on rows from random places of a text. Returns the mean loss of the last tenth of the steps."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, min(WARM_UP, steps // 2), steps)
    losses = []
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(ids) - length + 1, (batch,)).tolist()
        rows = torch.stack([ids[start : start + length] for start in starts])
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    model.eval()
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def recovered(kind: str, stock: Any, ids: Tensor, options: dict[str, Any]) -> tuple[Any, float | None]:
    """A model of a kind after calibration and recovery, and its loss; or read from a folder, without a loss."""
    place = options["checkpoints"] / kind if options["checkpoints"] else None
    if place is not None and (place / "config.json").exists():
        return hf_linattn.LinAttnGPT2LMHeadModel.from_pretrained(place).eval(), None
    rows = causal_lm.windows(ids, options["length"], 16)
    model, steps = causal_lm.converted(stock, kind, rows, options["max_chunks"]), options["steps"]
    loss = recover(model, ids, steps, batch=options["batch"], length=options["length"]) if steps else None
    if place is not None:
        model.save_pretrained(place)
    return model.eval(), loss


# -- reading ----------------------------------------------------------------------------------------------------------
def pieces(total: int, generator: torch.Generator) -> list[int]:
    """Sizes from 1 to 300 that add up to `total`; every fourth is a single token."""
    found: list[int] = []
    while total:
        size = 1 if len(found) % 4 == 3 else int(torch.randint(1, LONGEST_PIECE + 1, (1,), generator=generator))
        found.append(min(size, total))
        total -= found[-1]
    return found


def read(model: Any, row: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Logits `[tokens, vocabulary]` of a row of tokens, through one cache `sizes` tokens at a time, or without one."""
    if sizes is None:
        return model(input_ids=row[None], use_cache=False).logits[0]
    given = {cache_argument(model): transformers.DynamicCache(config=model.config)}
    return torch.cat([model(input_ids=part[None], use_cache=True, **given).logits[0] for part in row.split(sizes)])


@torch.inference_mode()
def perplexities(model: Any, rows: Tensor, single: int) -> dict[str, Any]:
    """Perplexity of rows `[windows, tokens]` without a cache, in pieces, and of the first `single` token by token."""
    generator = torch.Generator().manual_seed(0)
    losses: dict[str, list[Tensor]] = {"whole": [], "pieces": [], "steps": []}
    largest = 0.0
    for index, row in enumerate(rows):
        logits = {"whole": read(model, row), "pieces": read(model, row, pieces(len(row), generator))}
        if index < single:
            logits["steps"] = read(model, row, [1] * len(row))
        for name, found in logits.items():
            losses[name].append(cross_entropy(found[:-1].double(), row[1:]))
            largest = max(largest, float((found - logits["whole"]).abs().max()))

    plain, in_pieces, steps = (float(torch.stack(losses[name]).mean().exp()) for name in losses)
    plain_of_single = float(torch.stack(losses["whole"][:single]).mean().exp())
    return {
        "perplexity": plain,
        "in_pieces": in_pieces,
        "difference_in_pieces": abs(in_pieces - plain),
        "token_by_token": steps,
        "difference_token_by_token": abs(steps - plain_of_single),
        "largest_logit_difference": largest,
    }


@torch.inference_mode()
def agreement(model: Any, rows: Tensor) -> dict[str, float]:
    """Share of positions at which the most likely token is the same token by token and in the parallel form.

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
def greedy(model: Any, rows: Tensor) -> dict[str, Any]:
    """How many tokens generated with the cache are, up to the first other one, those of recomputing everything."""
    equal, distinct = [], []
    for row in rows:
        prompt = row[None, :PROMPT]
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(prompt)
        cached, again = (model.generate(prompt, use_cache=use, **options)[0, PROMPT:] for use in (True, False))
        different = (cached != again).nonzero()
        equal.append(int(different[0]) if len(different) else len(cached))
        distinct.append(len(cached.unique()))  # a text that repeats itself proves less
    return {"greedy_equal": equal, "greedy_distinct": distinct, "greedy_tokens": NEW}


def measured(kind: str, stock: Any, train: Tensor, text: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Everything about one kind, or about softmax with its own cache."""
    start = time.perf_counter()
    model, loss = recovered(kind, stock, train, options) if kind != causal_lm.SOFTMAX else (stock, None)
    trained = time.perf_counter()
    rows = causal_lm.windows(text, options["window"], options["windows"])
    single = rows[: options["single"]]
    found = perplexities(model, rows, len(single)) | greedy(model, causal_lm.windows(text, PROMPT, options["prompts"]))
    found |= agreement(copy.deepcopy(model).to(torch.bfloat16), single)
    seconds = {"recovery_seconds": trained - start, "seconds": time.perf_counter() - trained}
    wrong = failures(found) if kind != causal_lm.SOFTMAX else []
    return {"kind": kind, "loss": loss, **found, **seconds, "failures": wrong}


def failures(row: dict[str, Any]) -> list[str]:
    """What a row misses."""
    held = {
        "difference_in_pieces": row["difference_in_pieces"] <= TOLERANCE,
        "difference_token_by_token": row["difference_token_by_token"] <= TOLERANCE,
        "bfloat16_agreement": row["bfloat16_agreement"] >= AGREEMENT,
        "greedy_equal": min(row["greedy_equal"]) >= row["greedy_tokens"],
    }
    return [f"{name} is {row[name]}" for name, is_held in held.items() if not is_held]


def line(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    shown = [row["kind"], f"{row['perplexity']:.4f}"]
    shown += [f"{row[f'difference_{name}']:.1e}" for name in ("in_pieces", "token_by_token")]
    shown += [f"{row[f'bfloat16_agreement{name}']:.2%}" for name in ("", "_with_float32")]
    return [*shown, f"{row['greedy_equal']} of {row['greedy_tokens']}", str(row["greedy_distinct"])]


def main(
    model: Annotated[Path, typer.Option(exists=True, help="A GPT-2 checkpoint with its tokenizer.")],
    train: Annotated[list[Path], typer.Option(exists=True, help="Texts for calibration and recovery.")],
    evaluation: Annotated[list[Path], typer.Option("--eval", exists=True, help="Other texts.")],
    context: typer.Context,
    kinds: Annotated[str, typer.Option(help="Kinds, separated by commas.")] = ",".join(causal_lm.KINDS),
    steps: Annotated[int, typer.Option(min=0, help="Steps of recovery; 0 for none.")] = 150,
    batch: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens per row of recovery.")] = 256,
    window: Annotated[int, typer.Option(min=2, help="Tokens per row of evaluation.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Rows of evaluation.")] = 16,
    single: Annotated[int, typer.Option(min=1, help="Rows read token by token.")] = 2,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to generate from.")] = 2,
    max_chunks: Annotated[int, typer.Option(min=1, help="Summaries of eva-bounded; few, so that some merge.")] = 16,
    checkpoints: Annotated[Path | None, typer.Option(help="Keep recovered models here, and use those found.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print the table."""
    chosen = [kind.strip() for kind in kinds.split(",") if kind.strip()]
    if unknown := [kind for kind in chosen if kind not in causal_lm.KINDS]:
        raise typer.BadParameter(f"--kinds must be of {list(causal_lm.KINDS)}; got {unknown}.")
    stock = causal_lm.load(model, positions=max(window, length, PROMPT + NEW))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = causal_lm.tokens(tokenizer, train), causal_lm.tokens(tokenizer, evaluation)
    console, rows = Console(width=None if sys.stdout.isatty() else 140), []
    for kind in [causal_lm.SOFTMAX, *chosen]:
        rows.append(measured(kind, stock, *texts, context.params))
        console.print(f"{kind}: {'; '.join(rows[-1]['failures']) or 'done'}", highlight=False)
        if out is not None:
            options = {name: value for name, value in context.params.items() if isinstance(value, int)}
            write_experiment(out, {"options": {**options, "model": model.name}, "rows": rows})
    header = (
        "",
        "perplexity",
        "in pieces",
        "token by token",
        "bf16 argmax",
        "(bf16 = fp32)",
        "greedy equal",
        "distinct",
    )
    console.print(rich_table("With the cache and without", header, map(line, rows)))
    sys.exit(1 if any(row["failures"] for row in rows) else 0)


if __name__ == "__main__":
    typer.run(main)
