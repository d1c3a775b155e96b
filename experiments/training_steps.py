"""A training step of trained classifiers of texts on their own rows: time, in turns, and memory.

    python experiments/training_steps.py runs/softmax runs/eva --file documents/test.parquet --rows 2

The first model is what the others are compared with. Unlike in `hf-linattn bench` there is dropout, and rows of
different length are padded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import typer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_linattn  # noqa: F401  (so that Auto classes know converted models)
from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.memory import peak_bytes
from hf_linattn.bench.timing import Failure, time_calls, time_in_turns
from hf_linattn.data.files import TEXT_FORMATS, column_names, find_column, load_files
from hf_linattn.data.rows import TEXT_NAMES


def step_of(checkpoint: Path, texts: list[str], options: dict[str, float]) -> tuple[Callable[[], None], int]:
    """A training step of a saved model, forward, backward and optimizer, and how many tokens the longest row has."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32, **options).train()
    batch = AutoTokenizer.from_pretrained(checkpoint)(texts, padding=True, truncation=True, return_tensors="pt")
    labels = torch.arange(len(texts)) % model.config.num_labels
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()

    return step, batch["input_ids"].shape[1]


def main(
    checkpoints: Annotated[
        list[Path], typer.Argument(exists=True, file_okay=False, help="Folders of trained models.")
    ],
    file: Annotated[Path, typer.Option(help="Texts.")],
    rows: Annotated[int, typer.Option(min=1, help="In a step: the first ones of the file.")] = 2,
    attention_dropout: Annotated[bool, typer.Option(help="Softmax drops weights, as the config says.")] = True,
    seconds: Annotated[float, typer.Option(help="Timing of a model altogether.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="JSON of the results.")] = None,
) -> None:
    """Time a training step of every model."""
    shared.quiet()
    torch.set_num_threads(1)
    data = load_files([str(file)], "--file", TEXT_FORMATS)
    texts = data[find_column(column_names(data), None, TEXT_NAMES, "file")][:rows]
    options = {} if attention_dropout else {"attention_probs_dropout_prob": 0.0}
    steps, tokens = {}, 0
    for checkpoint in checkpoints:
        steps[checkpoint.name], tokens = step_of(checkpoint, texts, options)
    clock = partial(time_calls, clock=time.process_time)  # CPU time: other programs of the machine do not count
    timed = time_in_turns(steps, seconds=seconds, measure=clock)
    found: list[dict[str, Any]] = []
    for name, each in timed.items():
        if isinstance(each, Failure):
            raise typer.BadParameter(f"{name}: {each.reason}")
        faster = found[0]["CPU seconds"] / each.median if found else 1.0
        peak = peak_bytes(steps[name]) / 2**20
        found.append({"model": name, "CPU seconds": each.median, "times as fast": faster, "peak MiB": peak})
    shared.print_table("training step", found, f"{rows} rows of up to {tokens} tokens")
    if out is not None:
        write_experiment(
            out, {"rows in a step": rows, "tokens": tokens, "attention dropout": attention_dropout, "rows": found}
        )


if __name__ == "__main__":
    typer.run(main)
