"""The text classification recipe as a user runs it: a process of its own, files, bfloat16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from isolated import Finding

from .context import Context

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
DATA = RECIPES / "data" / "sst2_sample"
STEPS = 100


def recipe(context: Context) -> Iterator[Finding]:
    """Fine-tune a checkpoint on sentences, FAVOR# and EVA beside softmax: loss, accuracy, seconds of training."""
    if context.model is None:
        yield {"trained": "recipe", "reason": "no --model was given"}
        return
    for kind in ("favor_sharp", "softmax", "eva"):
        yield {"trained": f"recipe, {kind}"} | _run(context, context.model, kind)


def _run(context: Context, model: Path, kind: str) -> Finding:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "model_name_or_path": model.resolve(),
            "attention": kind,
            "train_file": DATA / "train.parquet",
            "validation_file": DATA / "validation.parquet",
            "max_length": 64,
            "max_steps": 2 if context.is_rehearsal else STEPS,
            "per_device_train_batch_size": 2 if context.is_rehearsal else 32,
            "logging_steps": 1 if context.is_rehearsal else 10,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "output_dir": folder,
        }
        if context.is_rehearsal:
            options |= {"max_train_samples": 8, "max_eval_samples": 8}
        flags = ["--do_train", "--do_eval", *(["--use_cpu"] if context.is_rehearsal else ["--bf16"])]
        flags += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        done = subprocess.run(
            [sys.executable, str(RECIPES / "text_classification.py"), *flags],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(RECIPES.parent), *filter(None, sys.path)])},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return {"failed": True, "reason": (done.stderr.strip().splitlines() or ["no output"])[-1]}
        state = json.loads((Path(folder) / "trainer_state.json").read_text())
    entries = {name: value for entry in state["log_history"] for name, value in entry.items()}
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return {
        "losses": losses,
        "accuracy": entries["eval_accuracy"],
        "train_seconds": entries["train_runtime"],
        "seconds": round(time.perf_counter() - start, 1),
    }
