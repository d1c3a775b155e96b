"""A task of Long Range Arena under every kind of attention: accuracy, and the time of a step beside softmax.

    python experiments/arena_runs.py recipes/configs/lra/listops_small.yaml --settings \
        '{"favor_plus": {"num_features": 64}, "favor_sharp": {"num_features": 64}, "eva": {"num_chunks": 64}}'

Every kind begins with the same weights, sees the same rows in the same order and takes the same steps. Then the
trained models are timed in turns, in this process, on rows of full length.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import typer
from transformers import TrainingArguments

from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.timing import Failure, time_calls, time_in_turns

sys.path.append(str(shared.ROOT / "recipes"))


def flags_of(config: Path, kind: str, settings: Any, output: Path, changes: Sequence[str]) -> list[str]:
    """The command line of one run."""
    flags = ["--config", str(config), "--attention", kind, "--output_dir", str(output), "--report_to", "none"]
    return [*flags, *(["--attention_config", json.dumps(settings)] if settings else []), *changes]


def train(flags: Sequence[str]) -> dict[str, Any]:
    """One run of the recipe, from its first step: scores, and seconds of CPU time altogether."""
    import long_range_arena

    started = time.process_time()
    results = long_range_arena.main([*flags, "--from_scratch", "--save_strategy", "no", "--disable_tqdm", "true"])
    metrics = results["metrics"]
    split = "test" if "test" in metrics else "eval"
    return {
        "accuracy": metrics[split][f"{split}_accuracy"],
        "split": split,
        "train loss": metrics["train"]["train_loss"],
        "CPU seconds": round(time.process_time() - started, 1),
        "attention": results["attention"],
        "training": {name: results["training"][name] for name in KEPT},
    }


KEPT = ("max_steps", "per_device_train_batch_size", "learning_rate", "warmup_steps", "seed", "bf16")


def majority(flags: Sequence[str], split: str) -> tuple[float, int]:
    """Accuracy of the most frequent label, and the number of rows it is counted on."""
    task = _task(flags)
    labels = Counter(task.data["test" if split == "test" else "validation"]["label"])
    return max(labels.values()) / labels.total(), labels.total()


def _task(flags: Sequence[str]) -> Any:
    import long_range_arena
    from lra.data import ArenaDataArguments
    from parts.finetuning import read_flags

    found = read_flags(ArenaDataArguments, flags, None, quiet=True, model_class=long_range_arena.ArenaArguments)
    return long_range_arena.prepare(found)


def step_of(output: Path, batch: int, tokens: int, learning_rate: float) -> Callable[[], None]:
    """A training step of a saved model on rows of so many tokens: forward, backward, optimizer."""
    from lra.model import BertForLongRangeArena

    model = BertForLongRangeArena.from_pretrained(output).train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, tokens) if model.num_towers == 1 else (batch, model.num_towers, tokens)
    ids = torch.randint(1, model.config.vocab_size, shape, generator=generator)
    labels = torch.randint(model.config.num_labels, (batch,), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()

    return step


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the recipe.")],
    kinds: Annotated[str, typer.Option(help="Separated by commas.")] = "softmax,favor_plus,favor_sharp,lara,eva",
    settings: Annotated[str, typer.Option(help="JSON: kind -> its settings, where they are not the defaults.")] = "{}",
    flags: Annotated[str, typer.Option(help="More flags of the recipe, separated by spaces.")] = "",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    tokens: Annotated[int, typer.Option(min=1, help="Of a row that is timed.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Rows that are timed.")] = 8,
    seconds: Annotated[float, typer.Option(help="Timing of one kind altogether.")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="JSON of the results.")] = None,
) -> None:
    """Train, score and time every kind."""
    shared.quiet()
    torch.set_num_threads(1)
    folders = {kind: runs / f"{config.stem}_{kind}" for kind in kinds.split(",")}
    chosen = json.loads(settings)
    lines = {kind: flags_of(config, kind, chosen.get(kind), folder, flags.split()) for kind, folder in folders.items()}
    found = {kind: train(line) for kind, line in lines.items()}
    share, count = majority(next(iter(lines.values())), next(iter(found.values()))["split"])

    rate = TrainingArguments(output_dir=str(runs)).learning_rate
    steps = {kind: step_of(folder, batch, tokens, rate) for kind, folder in folders.items()}
    clock = partial(time_calls, clock=time.process_time)  # CPU time: other programs of the machine do not count
    timed = time_in_turns(steps, seconds=seconds, measure=clock)
    if failed := {kind: each.reason for kind, each in timed.items() if isinstance(each, Failure)}:
        sys.exit(f"error: steps that failed: {failed}")
    medians = {kind: each.median for kind, each in timed.items() if not isinstance(each, Failure)}

    rows: list[dict[str, Any]] = []
    for kind, run in found.items():
        accuracy = run["accuracy"]
        row = {
            "kind": kind,
            "accuracy": accuracy,
            "standard error": math.sqrt(accuracy * (1 - accuracy) / count),
            "CPU seconds": run["CPU seconds"],
            "step": medians[kind],
        }
        rows.append(row | ({"times as fast": medians["softmax"] / medians[kind]} if "softmax" in medians else {}))
    caption = f"Majority class: {share:.3f} of {count} rows; a step of {batch} rows of {tokens} tokens, in CPU seconds"
    shared.print_table(config.stem, rows, caption)
    if out is not None:
        content = {"majority": share, "test_rows": count, "timed": {"batch": batch, "tokens": tokens}}
        write_experiment(out, {**content, "rows": rows, "runs": found})


if __name__ == "__main__":
    typer.run(main)
