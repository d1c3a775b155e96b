r"""Is a model better for short inputs that are softmax attention, on both sides of the border?

    python experiments/exact_below.py encoder --train validation.parquet --test test.parquet --out encoder.json
    python experiments/exact_below.py decoder --model GPT2 --train validation.parquet --test test.parquet \
        --out decoder.json

Maps of the learned preset are trained once, without the option (`hf_linattn.training.transfer_attention`), then the
same model is read with `exact_below` 0, 128 and 256. Below the border it is softmax; the questions are what becomes of
the other side, and whether the step hurts what is compared across it.

Encoder (MiniLM unless `--model` says otherwise): mean cosine of embeddings to softmax's for passages of each length,
and of a passage's embedding to that of the same passage with `STEP` tokens more, beside what softmax has there.
Decoder: perplexity of the predictions at places before 128, from 128 to 255, and from 256 on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from hf_linattn.bench.environment import write_experiment
from hf_linattn.modules.base import LinearAttention
from hf_linattn.modules.registry import get_kind
from hf_linattn.training import transfer_attention

BORDERS = (0, 128, 256)
LENGTHS = (64, 124, 132, 192, 252, 260, 384, 500)  # with [CLS] and [SEP]; pairs around either border
STEP = 8
LENGTH, ROWS = 512, 4  # of the batches that train


def set_border(model: Any, exact_below: int) -> Any:
    """The same layers with another `exact_below`."""
    for layer in model.modules():
        if isinstance(layer, LinearAttention):
            layer.config = layer.config.replace(exact_below=exact_below)
    return model


def pieces(ids: Tensor, length: int, seed: int) -> Iterator[Tensor]:
    """Batches of random pieces of a text."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - length, (ROWS,), generator=generator)
        yield torch.stack([ids[start : start + length] for start in starts])


@torch.inference_mode()
def embeddings(model: Any, rows: Tensor) -> Tensor:
    """Mean-pooled and normalised, `[rows, size]` in float64."""
    return normalize(torch.cat([model(part).last_hidden_state.mean(1) for part in rows.split(8)]).double(), dim=-1)


def encoder_scores(model: Any, stock: Any, texts: dict[int, Tensor]) -> dict[str, dict[str, float]]:
    """By length: cosine to softmax's embedding; cosine across `STEP` tokens, of this model and of softmax."""
    own, softmax = ({n: embeddings(it, rows) for n, rows in texts.items()} for it in (model, stock))
    found = {}
    for length in LENGTHS:
        longer = length + STEP
        found[str(length)] = {
            "to softmax": float((own[length] * softmax[length]).sum(-1).mean()),
            "to longer": float((own[length] * own[longer]).sum(-1).mean()),
            "softmax to longer": float((softmax[length] * softmax[longer]).sum(-1).mean()),
        }
    return found


@torch.inference_mode()
def decoder_scores(model: Any, rows: Tensor) -> dict[str, float]:
    """Perplexity by the place of the token that predicts."""
    losses = []
    for part in rows.split(ROWS):
        logits = model(part, use_cache=False).logits[:, :-1]
        losses.append(cross_entropy(logits.mT, part[:, 1:], reduction="none"))
    mean = torch.cat(losses).double().mean(0)
    parts = {"0-127": mean[:128], "128-255": mean[128:256], "256-": mean[256:], "all": mean}
    return {name: float(part.mean().exp()) for name, part in parts.items()}


def main(
    task: Annotated[str, typer.Argument(help="encoder or decoder.")],
    model: Annotated[Path | None, typer.Option(help="A softmax model; the encoder is MiniLM-L6 by default.")] = None,
    train: Annotated[list[Path] | None, typer.Option(help="Texts to train maps on.")] = None,
    test: Annotated[list[Path] | None, typer.Option(help="Texts to score on.")] = None,
    kinds: Annotated[str, typer.Option(help="Separated by commas.")] = "favor_plus",
    steps: Annotated[int, typer.Option(min=1, help="Of attention transfer.")] = 60,
    passages: Annotated[int, typer.Option(min=1, help="Passages, or windows, to score.")] = 64,
    out: Annotated[Path | None, typer.Option(help="JSON of the results, written after every kind.")] = None,
) -> None:
    """Scores of softmax and of the learned preset with each border."""
    if task not in ("encoder", "decoder") or not train or not test:
        sys.exit("error: the task must be 'encoder' or 'decoder', with --train and --test.")
    torch.set_num_threads(1)
    is_encoder = task == "encoder"
    if is_encoder:
        stock, tokenizer = shared.encoder(model)
        ids, seen = (shared.read_tokens(tokenizer, paths) for paths in (train, test))
        whole = shared.rows_of(seen, LENGTH + STEP, passages)
        sizes = sorted({*LENGTHS, *(n + STEP for n in LENGTHS if n + STEP <= LENGTH)})
        texts = {n: shared.with_ends(tokenizer, whole[:, : n - 2]) for n in sizes}
        batches = ({"input_ids": shared.with_ends(tokenizer, part)} for part in pieces(ids, LENGTH - 2, 0))
    else:
        from transformers import AutoTokenizer

        stock = shared.decoder(model, LENGTH).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids, seen = (shared.read_tokens(tokenizer, paths) for paths in (train, test))
        rows = shared.rows_of(seen, LENGTH, passages)
        batches = ({"input_ids": part} for part in pieces(ids, LENGTH, 0))
    found = [] if is_encoder else [{"attention": "softmax", **decoder_scores(stock, rows)}]
    for kind in kinds.split(","):
        made = shared.converted(stock, get_kind(kind).config_cls(learned=True), list(islice(batches, 2)))
        transfer_attention(made, batches, steps=steps)
        made.eval()
        for exact_below in BORDERS:
            set_border(made, exact_below)
            scores = encoder_scores(made, stock, texts) if is_encoder else decoder_scores(made, rows)
            found.append({"attention": kind, "exact_below": exact_below, **scores})
        shared.print_table(f"{task}, {steps} steps", [_short(row) for row in found])
        if out is not None:
            write_experiment(out, {"task": task, "steps": steps, "passages": passages, "step": STEP, "rows": found})


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: of lengths the three figures side by side."""
    return {key: list(value.values()) if isinstance(value, dict) else value for key, value in row.items()}


if __name__ == "__main__":
    typer.run(main)
