"""Quality, speed and memory of a text classification checkpoint beside its softmax original.

    python recipes/evaluate_checkpoint.py --model_name_or_path runs/favor_sharp --test_file dev.parquet

The original is the same checkpoint under softmax attention (what `hf_linattn.revert` gives), or `--baseline`, say a
model fine-tuned with softmax. Each is measured in a process of its own, so that neither finds the other's memory.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser

from _common import ClassificationMetrics, RecipeError, linear_attention_of, load_splits, run, versions, write_json
from _text import (
    ColumnArguments,
    checkpoint_index,
    choose_max_length,
    find_columns,
    find_labels,
    label_names,
    tokenizer_function,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class EvaluationArguments(ColumnArguments):
    """What is measured, and how."""

    model_name_or_path: str = field(default="", metadata={"help": "Hub name or local folder of the checkpoint"})
    baseline: str | None = field(
        default=None, metadata={"help": "Model to compare with (default: the checkpoint itself under softmax)"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub; see --split"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration"})
    split: str = field(default="test", metadata={"help": "Split of --dataset_name"})
    test_file: str | None = field(default=None, metadata={"help": "parquet, csv, tsv, json or jsonl"})
    max_samples: int | None = field(default=None, metadata={"help": "Use only the first so many"})
    batch_size: int = field(default=8, metadata={"help": "Texts in a batch"})
    repeats: int = field(default=3, metadata={"help": "Timed passes over --timed_batches; the median counts"})
    timed_batches: int = field(default=8, metadata={"help": "Batches in a timed pass, spread over all lengths"})
    dtype: str = field(default="float32", metadata={"help": f"One of {', '.join(DTYPES)}"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise RecipeError("--model_name_or_path is required: a Hub name or a local folder.")
        if self.dtype not in DTYPES:
            raise RecipeError(f"--dtype must be one of {list(DTYPES)}; got {self.dtype!r}.")
        for name in ("batch_size", "repeats", "timed_batches"):
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name} must be at least 1; got {getattr(self, name)}.")


def measure(args: EvaluationArguments, path: str, softmax: bool, title: str) -> dict[str, Any]:
    """Everything about one model. Runs in a process of its own."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=DTYPES[args.dtype]).to(device).eval()
    if softmax:
        model.set_attn_implementation("sdpa")
    batches, labels = make_batches(args, model, tokenizer)

    every = max(1, len(batches) // args.timed_batches)
    timed = batches[every // 2 :: every][: args.timed_batches]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in timed)
    predictions: list[int] = []
    with torch.inference_mode():
        predict(model, timed[-1])  # the longest: warms up, and reaches the peak on a GPU too
        before = memory(device, reset=True)
        for batch in timed:
            predict(model, batch)
        after = memory(device)
        seconds = []
        for _ in tqdm(range(args.repeats), desc=f"{title}: timing", leave=False):
            start = time.perf_counter()
            for batch in timed:
                predict(model, batch)
            seconds.append(time.perf_counter() - start)
        for batch in tqdm(batches, desc=f"{title}: predicting", leave=False):
            predictions += predict(model, batch).argmax(-1).tolist()
    attention = linear_attention_of(model)
    return {
        "model": path,
        "attention": "softmax" if softmax or not attention else attention["kind"],
        **ClassificationMetrics(model.config.num_labels).compute(predictions=predictions, references=labels),
        "tokens_per_second": tokens / statistics.median(seconds),
        "seconds": seconds,
        "peak_memory_mib": after["peak"] / 2**20,
        "activation_memory_mib": max(0, after["peak"] - before["now"]) / 2**20,
        "rows": len(predictions),
        "tokens_timed": tokens,
    }


def make_batches(args: EvaluationArguments, model: Any, tokenizer: Any) -> tuple[list[dict[str, Any]], list[int]]:
    """Padded batches, short texts first, and the labels in the same order."""
    splits = load_splits({"test": args.test_file}, args.dataset_name, args.dataset_config_name)
    split = "test" if args.test_file else args.split
    if split not in splits:
        raise RecipeError(f"--split {split!r} does not exist; splits: {list(splits)}.")
    data = splits[split]
    if args.max_samples is not None:
        data = data.select(range(min(args.max_samples, len(data))))
    splits = type(splits)({split: data})
    columns = find_columns(splits, args)
    values = find_labels(splits, columns.label)
    index = checkpoint_index(values, label_names(splits, columns.label, values), model.config)
    if index is None:
        raise RecipeError(f"The labels {values} do not fit those of the checkpoint, {model.config.label2id}.")
    max_length = choose_max_length(args.max_length, tokenizer, model.config)
    tokenize = tokenizer_function(tokenizer, columns, index, max_length)
    data = data.map(tokenize, batched=True, remove_columns=data.column_names, desc="Tokenizing")
    data = data.select([i for _, i in sorted((length, i) for i, length in enumerate(data["length"]))])
    labels = list(data["label"])
    data = data.remove_columns(["label", "length"])
    pad = DataCollatorWithPadding(tokenizer)
    starts = range(0, len(data), args.batch_size)
    rows = [[data[i] for i in range(s, min(s + args.batch_size, len(data)))] for s in starts]
    return [dict(pad(part)) for part in rows], labels


def predict(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits on the CPU in float32; copying them waits for the device."""
    return model(**{k: v.to(model.device) for k, v in batch.items()}).logits.float().cpu()


def memory(device: torch.device, reset: bool = False) -> dict[str, int]:
    """Bytes in use and at the peak: of the accelerator, else of this process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    status = Path("/proc/self/status")
    if status.exists():
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return {
            "now": int(fields["VmRSS"].split()[0]) * 1024,
            "peak": int(fields["VmHWM"].split()[0]) * 1024,
        }
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"now": peak, "peak": peak}


def show(ours: Mapping[str, Any], original: Mapping[str, Any]) -> None:
    """The table."""
    table = Table(title=f"{ours['model']} ({ours['rows']} texts)")
    table.add_column("")
    table.add_column(f"{original['attention']}", justify="right")
    table.add_column(f"{ours['attention']}", justify="right")
    table.add_column("", justify="right")
    for name in ("accuracy", "f1"):
        difference = f"{100 * (ours[name] - original[name]):+.1f} points"
        table.add_row(name, f"{original[name]:.4f}", f"{ours[name]:.4f}", difference)
    for name, text in (
        ("tokens_per_second", "tokens / s"),
        ("peak_memory_mib", "peak memory, MiB"),
        ("activation_memory_mib", "of it for activations, MiB"),
    ):
        ratio = f"{ours[name] / original[name]:.2f}x" if original[name] else ""
        table.add_row(text, f"{original[name]:,.0f}", f"{ours[name]:,.0f}", ratio)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure both, print the table. Returns what `--output` gets."""
    parser = HfArgumentParser(EvaluationArguments, description=__doc__)
    (args,) = parser.parse_args_into_dataclasses(args=list(sys.argv[1:] if argv is None else argv))
    jobs = [
        (args.baseline, False, "baseline") if args.baseline else (args.model_name_or_path, True, "softmax"),
        (args.model_name_or_path, False, "checkpoint"),
    ]
    results = []
    for path, softmax, title in jobs:
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, args, path, softmax, title).result())
    original, ours = results
    show(ours, original)
    report = {
        "recipe": Path(__file__).stem,
        "checkpoint": ours,
        "original": original,
        "settings": asdict(args),
        "versions": versions(),
    }
    if args.output:
        print(f"Wrote {write_json(args.output, report)}")
    return json.loads(json.dumps(report))


if __name__ == "__main__":
    run(main)
