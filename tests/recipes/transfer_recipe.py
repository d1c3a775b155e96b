"""Command lines of the attention transfer recipe, on tiny models of every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECIPE = "recipes/attention_transfer.py"
LENGTH = 40  # tokens of a row


def arguments(folder: Path, output: Path, family: str = "gpt2", kind: str = "favor_plus", *changes: str) -> list[str]:
    """The command line of six steps of four rows, saved after every second."""
    images = family == "vit"
    values: dict[str, Any] = {
        "model_name_or_path": folder / family,
        "attention": kind,
        "attention_config": json.dumps({"window_size": 2 if images else 8}),
        "train_file": folder / ("images.parquet" if images else "text.jsonl"),
        "output_dir": output,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "max_eval_samples": 6,
        "calibration_samples": 12,
        "save_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": "true",
        "report_to": "none",
    }
    if not images:
        values["max_length"] = LENGTH
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [*flags, "--do_train", "--do_eval", *changes]
