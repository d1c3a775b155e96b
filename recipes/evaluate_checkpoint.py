"""Quality, speed and memory of a checkpoint beside its softmax original, on the data of any task.

    python recipes/evaluate_checkpoint.py --model_name_or_path runs/favor_sharp --test_file dev.parquet

The head of the checkpoint says which task it is (`--task` otherwise), and the data has the flags of that task's recipe
(`--task question_answering --help` lists them). The original is the same checkpoint with softmax attention
(`hf_linattn.revert`), or `--baseline`, say a model fine-tuned with softmax. The difference of the two comes with its
standard error, paired row by row. Each is measured in a process of its own, so that neither finds the other's memory;
under `accelerate launch` the processes share the rows, and only quality is measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from hf_linattn.hub import Measurement, write_results
from hf_linattn.hub.results import check_card
from parts.common import RecipeError, run, versions, write_json
from parts.evaluation import attention_of, known_tasks, load, measure_cost, paired, predict, recipe_of
from parts.processes import ADVICE, missing_processes
from parts.training import parse_flags

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COSTS = (
    ("tokens_per_second", "tokens / s"),
    ("peak_memory_mib", "peak memory, MiB"),
    ("activation_memory_mib", "of it for activations, MiB"),
)


@dataclass
class EvaluationArguments:
    """What is measured, and how."""

    model_name_or_path: str = field(metadata={"help": "Hub name or local folder of the checkpoint"})
    task: str | None = field(
        default=None, metadata={"help": f"One of {known_tasks()} (default: that of the checkpoint's head)"}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Model to compare with (default: the checkpoint itself under softmax)"}
    )
    split: str | None = field(
        default=None, metadata={"help": "'validation' or 'test' (default: the one with a file, else test)"}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows in a batch"})
    repeats: int = field(
        default=3, metadata={"help": "Timed passes over --timed_batches; the median counts. 0: no timing"}
    )
    timed_batches: int = field(default=8, metadata={"help": "Batches in a timed pass, spread over all lengths"})
    dtype: str = field(default="float32", metadata={"help": f"One of {', '.join(DTYPES)}"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    eval_results: bool = field(
        default=False,
        metadata={"help": "Write the metrics into the checkpoint's folder: as .eval_results, and in its model card"},
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"--dtype must be one of {list(DTYPES)}; got {self.dtype!r}.")
        if self.split not in (None, "validation", "test"):
            raise RecipeError(f"--split must be 'validation' or 'test'; got {self.split!r}.")
        for name, least in (("batch_size", 1), ("repeats", 0), ("timed_batches", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"--{name} must be at least {least}; got {getattr(self, name)}.")


def read_flags(argv: Sequence[str] | None) -> tuple[EvaluationArguments, Any, Any]:
    """The flags, those of the data, and the recipe of the task."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    first.add_argument("--model_name_or_path")
    known = first.parse_known_args(argv)[0]
    if known.task is not None and known.task not in known_tasks().split(", "):
        raise RecipeError(f"--task must be one of {known_tasks()}; got {known.task!r}.")
    name = known.task or (recipe_of(known.model_name_or_path) if known.model_name_or_path else "text_classification")
    recipe = importlib.import_module(name)
    args, data = parse_flags((EvaluationArguments, recipe.ARGUMENTS), argv, __doc__)
    args.task = name
    if args.split is None:
        args.split = "validation" if data.validation_file and not data.test_file else "test"
    if args.eval_results and not (data.dataset_name and Path(args.model_name_or_path).is_dir()):
        raise RecipeError("--eval_results needs --dataset_name, a data set of the Hub, and a local checkpoint.")
    if args.eval_results:
        check_card(Path(args.model_name_or_path))
    return args, data, recipe


def measure(args: EvaluationArguments, data: Any, path: str, softmax: bool, title: str) -> dict[str, Any]:
    """Everything about one model."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    recipe = importlib.import_module(args.task or "")
    task = load(recipe.prepare, path, data, args.split or "", args.batch_size, DTYPES[args.dtype], softmax)
    result: dict[str, Any] = {"model": path, "attention": attention_of(task.model)}
    if args.repeats and PartialState().num_processes == 1:
        cost = measure_cost(task, args.split or "", args.batch_size, args.timed_batches, args.repeats, title)
        result |= cost.to_dict()
    scores, rows = predict(task, args.split or "", args.batch_size)
    return (
        result
        | scores.metrics
        | {
            "metrics": list(scores.metrics),
            "main_metric": task.main_metric,
            "rows": rows,
            "scores": scores.rows.tolist(),
        }
    )


def measure_both(args: EvaluationArguments, data: Any) -> list[dict[str, Any]]:
    """The original and the checkpoint; in processes of their own where this is the only one."""
    jobs = [
        (args.baseline, False, "baseline") if args.baseline else (args.model_name_or_path, True, "softmax"),
        (args.model_name_or_path, False, "checkpoint"),
    ]
    if PartialState().num_processes > 1:
        return [measure(args, data, *job) for job in jobs]
    results = []
    for job in jobs:
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, args, data, *job).result())
    return results


def show(ours: Mapping[str, Any], original: Mapping[str, Any], difference: Mapping[str, float]) -> None:
    """The table."""
    table = Table(title=f"{ours['model']} ({ours['rows']} rows)")
    table.add_column("")
    table.add_column(f"{original['attention']}", justify="right")
    table.add_column(f"{ours['attention']}", justify="right")
    table.add_column("", justify="right")
    for name in ours["metrics"]:
        text = f"{ours[name] - original[name]:+.4f}"
        if name == ours["main_metric"]:
            text += f" (row by row {difference['difference']:+.4f} ± {difference['standard_error']:.4f})"
        table.add_row(name, f"{original[name]:.4f}", f"{ours[name]:.4f}", text)
    for name, text in COSTS:
        if name in ours:
            ratio = f"{ours[name] / original[name]:.2f}x" if original[name] else ""
            table.add_row(text, f"{original[name]:,.0f}", f"{ours[name]:,.0f}", ratio)
    Console().print(table)


def measured(args: EvaluationArguments, data: Any, ours: Mapping[str, Any]) -> list[Measurement]:
    """The metrics of the checkpoint, as the Hub takes them."""
    task, notes = (args.task or "").replace("_", "-"), f"{ours['rows']} rows, {ours['attention']} attention"
    place = (task, data.dataset_name, data.dataset_config_name, args.split)
    return [Measurement(name, ours[name], *place, notes=notes) for name in ours["metrics"]]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure both, print the table. Returns what `--output` gets."""
    args, data, _ = read_flags(argv)
    if not torch.accelerator.is_available():
        PartialState(cpu=True)
    state = PartialState()
    if found := missing_processes(state.num_processes):
        print(f"{found}. {ADVICE}", file=sys.stderr)
    if state.is_main_process and state.num_processes > 1:
        print(f"{state.num_processes} processes on {state.device.type} share the rows")
    original, ours = measure_both(args, data)
    difference = paired(ours.pop("scores"), original.pop("scores"))
    report = {
        "recipe": Path(__file__).stem,
        "checkpoint": ours,
        "original": original,
        "paired": difference,
        "settings": {**asdict(args), **asdict(data)},
        "processes": PartialState().num_processes,
        "versions": versions(),
    }
    if PartialState().is_main_process:
        show(ours, original, difference)
        if args.output:
            print(f"Wrote {write_json(args.output, report)}")
        if args.eval_results:
            for path in write_results(Path(args.model_name_or_path), args.task or "", measured(args, data, ours)):
                print(f"Wrote {path}")
    return json.loads(json.dumps(report))


if __name__ == "__main__":
    run(main)
