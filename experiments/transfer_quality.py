r"""What attention transfer gives back of what a converted model loses, beside its controls.

    python experiments/transfer_quality.py gpt2 --model GPT2 --train validation.parquet --train-rows 3380 \
        --test test.parquet --rows "favor_plus-16,eva-chunk16" --seeds 0,1 --out gpt2.json
    python experiments/transfer_quality.py recall --model RECALL --steps 300 --fine-tune 300 --out recall.json

Tasks are the files of `transfer_tasks`; each names the rows that it has. Of a row with learned maps only these are
trained, without labels. Controls: the same maps untrained; after training, the window alone and shuffled slots
(`hf_linattn.conversion.ablation`); rows with random features. `--fine-tune` then trains the whole model with labels,
the rows with random features too. A control is scored on a part of the test data, as is the trained model once more.
"""

from __future__ import annotations

import fnmatch
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import typer
from transfer_tasks import TASKS, BaseTask, Files, load_task

from hf_linattn.bench.environment import write_experiment
from hf_linattn.conversion.ablation import ablated
from hf_linattn.modules.config import AttentionConfig
from hf_linattn.training import transfer_attention

CALIBRATION_BATCHES = 4
CONTROLS = ("window_alone", "shuffled_slots")
FINE_TUNING_RATE = 1e-3


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


@dataclass(frozen=True)
class Plan:
    """What is done with the maps of a row: arguments of `transfer_attention`, and steps of the stages after it."""

    steps: int
    learning_rate: float | None
    row_weight: float
    second_stage: int
    fine_tune: int


def measure(task: BaseTask, settings: Any, seed: int, plan: Plan) -> dict[str, Any]:
    """The scores of one row."""
    calibration = list(islice(task.batches(1000 + seed), CALIBRATION_BATCHES))
    model = shared.converted(task.model, settings.replace(seed=seed), calibration)
    row: dict[str, Any] = {"seed": seed, "settings": model.config.linear_attention}
    row["untrained, few"] = task.score(model, few=True)
    if settings.learned:
        clocks = time.perf_counter(), time.process_time()
        row["errors"] = transfer(task, model, seed, plan)
        row["seconds"], row["CPU seconds"] = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
        row["trained"], row["trained, few"] = task.score(model), task.score(model, few=True)
        for control in CONTROLS:
            with ablated(model, control):
                row[f"{control}, few"] = task.score(model, few=True)
    else:
        row["untrained"] = task.score(model)
    if plan.fine_tune:
        fine_tune(task, model, plan.fine_tune, seed)
        row["fine-tuned"] = task.score(model)
    return row


def transfer(task: BaseTask, model: Any, seed: int, plan: Plan) -> list[float]:
    """Train the maps. Returns: relative error of the attention output, layer by layer."""
    batches = task.batches(seed)
    rates: dict[str, Any] = {"learning_rate": plan.learning_rate}
    done = transfer_attention(model, batches, steps=plan.steps, row_weight=plan.row_weight, **rates)
    if plan.second_stage:
        transfer_attention(model, batches, steps=plan.second_stage, target="hidden_states", **rates)
    return [round(error, 3) for error in done[-1].errors]


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
    learning_rate: Annotated[float | None, typer.Option(help="Of both stages; unless said, the library's.")] = None,
    row_weight: Annotated[float, typer.Option(min=0, help="Of the cross-entropy between attention rows.")] = 0.0,
    second_stage: Annotated[int, typer.Option(min=0, help="Then so many steps towards hidden states.")] = 0,
    fine_tune: Annotated[int, typer.Option(min=0, help="Then so many steps of training everything, labelled.")] = 0,
    softmax: Annotated[bool, typer.Option(help="Score the softmax model too, as the first row.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON of the results, written after every row.")] = None,
) -> None:
    """Scores of softmax, of the controls, and of learned maps after transfer."""
    if task not in TASKS:
        sys.exit(f"error: the task must be one of {list(TASKS)}; got {task!r}.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    it = load_task(task, Files(model, tuple(train or ()), tuple(test or ()), train_rows))
    if fine_tune and type(it).labelled_batches is BaseTask.labelled_batches:
        sys.exit(f"error: --fine-tune must be 0 with the task {task!r}, which has no labels; got {fine_tune}.")
    plan = Plan(steps, learning_rate, row_weight, second_stage, fine_tune)
    found: list[dict[str, Any]] = []
    if softmax:
        scores = {"trained": it.score(it.model), "trained, few": it.score(it.model, few=True)}
        found.append({"attention": "softmax", **scores})
    for name, settings in chosen_rows(it, rows).items():
        for seed in map(int, seeds.split(",")):
            found.append({"attention": name, **measure(it, settings, seed, plan)})
            shared.print_table(f"{task}, {steps} steps", [_short(row) for row in found], it.about)
            if out is not None:
                write_experiment(out, {"task": task, "about": it.about, **asdict(plan), "rows": found})


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: of each score the main figure."""
    return {
        key: next(iter(value.values())) if isinstance(value, dict) else value
        for key, value in row.items()
        if key != "settings"
    }


if __name__ == "__main__":
    typer.run(main)
