"""What attention transfer gives back of what a converted model loses, beside its controls.

    python experiments/attention_transfer.py gpt2 --model GPT2 --train validation.parquet --train-rows 3380 \
        --test test.parquet --rows "favor_plus*" --seeds 0,1 --out favor_plus.json
    python experiments/attention_transfer.py recall --model RECALL --steps 300 --fine-tune 300 --out recall.json

Tasks are the files of `transfer_tasks`; each names the rows that it has. Of a row with learned maps only these are
trained, without labels. Controls: the same maps untrained; after training, their slots shuffled (each query reads the
slots of others) and the window alone; rows with random features. `--fine-tune` then trains the whole model with
labels, the rows with random features too. A control is scored on a part of the test data, as is the trained model once
more.
"""

from __future__ import annotations

import copy
import fnmatch
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import typer
from transfer_tasks import TASKS, BaseTask, Files, load_task

from hf_linattn.bench.environment import write_experiment
from hf_linattn.modules.base import LinearAttention
from hf_linattn.modules.config import AttentionConfig
from hf_linattn.training import transfer_attention

CALIBRATION_BATCHES = 4
FINE_TUNING_RATE = 1e-3


def layers(model: Any) -> list[LinearAttention[Any]]:
    return [module for module in model.modules() if isinstance(module, LinearAttention)]


def without_slots(model: Any) -> Any:
    """A copy whose slots or chunks hold no mass: the window alone."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(made):
            layer.tensors()["far_offset"].fill_(-1e4)
            for name in {"far_slope", "key_slope"} & set(layer.tensors()):
                layer.tensors()[name].zero_()
    return made


def shuffled(model: Any) -> Any | None:
    """A copy in which the directions of queries belong to other slots; `None` for chunks."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(made):
            if "query_directions" not in layer.tensors():
                return None
            for name in ("query_directions", "slot_bias"):
                tensor = layer.tensors()[name]
                tensor.copy_(tensor.roll(1, dims=1))
    return made


def fine_tune(task: BaseTask, model: Any, steps: int, seed: int) -> None:
    """Train a whole model with labels: AdamW, a cosine decay of the learning rate to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=FINE_TUNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for batch in islice(task.labelled_batches(seed), steps):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def measure(
    task: BaseTask, settings: AttentionConfig, seed: int, transfer: dict[str, Any], steps: int
) -> dict[str, Any]:
    """The scores of one row.

    Args:
        transfer: Arguments of `transfer_attention`.
        steps: Of fine-tuning.
    """
    calibration = list(islice(task.batches(1000 + seed), CALIBRATION_BATCHES))
    model = shared.converted(task.model, settings.replace(seed=seed), calibration)
    row: dict[str, Any] = {"seed": seed, "settings": model.config.linear_attention}
    row["untrained, few"] = task.score(model, few=True)
    if settings.learned:
        start = time.perf_counter()
        done = transfer_attention(model, task.batches(seed), **transfer)
        row["seconds"] = round(time.perf_counter() - start, 1)
        row["errors"] = [round(error, 3) for error in done[-1].errors]
        row["trained"], row["trained, few"] = task.score(model), task.score(model, few=True)
        for name, control in {"window alone": without_slots(model), "shuffled slots": shuffled(model)}.items():
            row[f"{name}, few"] = control and task.score(control, few=True)
    else:
        row["untrained"] = task.score(model)
    if steps:
        fine_tune(task, model, steps, seed)
        row["fine-tuned"] = task.score(model)
    return row


def chosen_rows(task: BaseTask, patterns: str) -> dict[str, AttentionConfig]:
    """The rows whose names match one of the patterns. Ends the script if that is none."""
    settings = task.settings()
    found = {name: settings[name] for pattern in patterns.split(",") for name in fnmatch.filter(settings, pattern)}
    if not found:
        sys.exit(f"error: --rows must match one of {sorted(settings)}; got {patterns!r}.")
    return found


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")],
    model: Annotated[Path | None, typer.Option(help="A softmax model, with its tokenizer or image processor.")] = None,
    train: Annotated[list[Path] | None, typer.Option(help="Files to transfer on; may be repeated.")] = None,
    test: Annotated[list[Path] | None, typer.Option(help="Files to score on; may be repeated.")] = None,
    train_rows: Annotated[int | None, typer.Option(min=1, help="Only the first rows of a training file.")] = None,
    rows: Annotated[str, typer.Option(help="Patterns of names of rows, separated by commas.")] = "*",
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0",
    steps: Annotated[int, typer.Option(min=1, help="Of attention transfer.")] = 100,
    learning_rate: float = 1e-2,
    fine_tune: Annotated[int, typer.Option(min=0, help="Steps of training everything with labels after that.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON of the results, written after every row.")] = None,
) -> None:
    """Scores of softmax, of the controls, and of learned maps after transfer."""
    if task not in TASKS:
        sys.exit(f"error: the task must be one of {list(TASKS)}; got {task!r}.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    it = load_task(task, Files(model, tuple(train or ()), tuple(test or ()), train_rows))
    chosen = chosen_rows(it, rows)
    transfer = {"steps": steps, "learning_rate": learning_rate}
    softmax = {"attention": "softmax", "trained": it.score(it.model), "trained, few": it.score(it.model, few=True)}
    found = [softmax]
    for name, settings in chosen.items():
        for seed in map(int, seeds.split(",")):
            found.append({"attention": name, **measure(it, settings, seed, transfer, fine_tune)})
            shared.print_table(f"{task}, {steps} steps", [_short(row) for row in found], it.about)
            if out is not None:
                plan = {"task": task, "about": it.about, "transfer": transfer, "fine_tune_steps": fine_tune}
                write_experiment(out, {**plan, "rows": found})


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: of each score the main figure."""
    return {
        key: next(iter(value.values())) if isinstance(value, dict) else value
        for key, value in row.items()
        if key != "settings"
    }


if __name__ == "__main__":
    typer.run(main)
