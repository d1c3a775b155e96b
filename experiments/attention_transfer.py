"""What a few steps of attention transfer do to the perplexity of a converted decoder, beside its controls.

    python experiments/attention_transfer.py --model GPT2 --train train.parquet --test test.parquet

Only the maps are trained, without labels. Controls: the same maps untrained, their slots shuffled after training (each
query then reads the slots of others), the window alone, and random features.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer

from hf_linattn.bench.environment import write_experiment
from hf_linattn.modules.base import LinearAttention
from hf_linattn.modules.registry import get_kind
from hf_linattn.training import transfer_attention

KINDS = ("favor_plus", "favor_sharp", "lara")  # EVA has chunks instead of slots
ROWS = 4  # of a batch


def perplexity(model: Any, rows: Tensor) -> float:
    with torch.no_grad():
        losses = [float(model(part, labels=part).loss) * len(part) for part in rows.split(ROWS)]
    return math.exp(sum(losses) / len(rows))


def layers(model: Any) -> list[LinearAttention[Any]]:
    return [module for module in model.modules() if isinstance(module, LinearAttention)]


def without_slots(model: Any) -> Any:
    """A copy whose slots hold no mass: the window alone."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(made):
            layer.tensors()["far_offset"].fill_(-1e4)
            layer.tensors()["far_slope"].zero_()
    return made


def shuffled(model: Any) -> Any:
    """A copy in which the directions of queries belong to other slots."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(made):
            for name in ("query_directions", "slot_bias"):
                tensor = layer.tensors()[name]
                tensor.copy_(tensor.roll(1, dims=1))
    return made


def sampled(ids: Tensor, length: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of random pieces of a text, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - length, (ROWS,), generator=generator)
        yield {"input_ids": torch.stack([ids[start : start + length] for start in starts])}


def main(
    model: Annotated[Path, typer.Option(help="A GPT-2 with its tokenizer.")],
    train: Annotated[Path, typer.Option(help="Text to train on.")],
    test: Annotated[Path, typer.Option(help="Text to measure on.")],
    slots: Annotated[str, typer.Option(help="Numbers of slots, separated by commas.")] = "16,64",
    steps: Annotated[int, typer.Option(min=1)] = 100,
    length: Annotated[int, typer.Option(min=64, help="Tokens of a row.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Rows of the test text.")] = 64,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON of the results.")] = None,
) -> None:
    """Perplexity of softmax, of the controls, and of learned maps after transfer."""
    stock = shared.decoder(model, length)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = shared.read_tokens(tokenizer, [train])
    rows = shared.rows_of(shared.read_tokens(tokenizer, [test]), length, windows)
    found: list[dict[str, Any]] = [{"attention": "softmax", "perplexity": perplexity(stock, rows)}]
    random_features = shared.converted(stock, "favor_plus", [])
    found.append({"attention": "favor_plus, 256 random", "perplexity": perplexity(random_features, rows)})
    for kind in KINDS:
        config = get_kind(kind)
        for number in map(int, slots.split(",")):
            for seed in range(seeds):
                settings = config.config_cls(learned=True, seed=seed, **{config.size_field: number})
                made = shared.converted(stock, settings, [next(sampled(ids, length, 100 + seed)) for _ in range(4)])
                before = perplexity(made, rows)
                start = time.perf_counter()
                done = transfer_attention(made, sampled(ids, length, seed), steps=steps)
                found.append(
                    {
                        "attention": f"{kind}, {number} learned",
                        "seed": seed,
                        "untrained": before,
                        "perplexity": perplexity(made, rows),
                        "shuffled": perplexity(shuffled(made), rows),
                        "window alone": perplexity(without_slots(made), rows),
                        "errors": [round(error, 3) for error in done[-1].errors],
                        "seconds": round(time.perf_counter() - start, 1),
                    }
                )
                shared.print_table(f"After {steps} steps", found)
    if out is not None:
        write_experiment(out, {"steps": steps, "length": length, "windows": windows, "rows": found})


if __name__ == "__main__":
    typer.run(main)
