"""Measuring one model on one task: scores row by row, speed, memory."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from hf_linattn.integrations.batches import is_label

from .adaptation import AdaptationArguments
from .common import KEEP, SOFTMAX, AttentionArguments, RecipeError, linear_attention_of
from .finetuning import Flags, Scores, Task
from .repeatable import RepeatableTrainer
from .training import ModelArguments, RecipeTrainingArguments

# What the head of a checkpoint is for -> the recipe of the task.
RECIPES = {
    "SequenceClassification": "text_classification",
    "TokenClassification": "token_classification",
    "QuestionAnswering": "question_answering",
    "ImageClassification": "image_classification",
    "MaskedLM": "language_modeling",
    "LMHeadModel": "language_modeling",
}


def recipe_of(path: str) -> str:
    """Name of the recipe for a checkpoint's head. Raises: RecipeError if it has none of a known task."""
    try:
        names = AutoConfig.from_pretrained(path).architectures or [""]
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    for head, recipe in RECIPES.items():
        if names[0].endswith(head):
            return recipe
    raise RecipeError(f"{path!r} is a {names[0] or 'model without a head'}: give --task, one of {known_tasks()}.")


def known_tasks() -> str:
    return ", ".join(sorted(set(RECIPES.values())))


def load(prepare: Any, path: str, data: Any, split: str, batch_size: int, dtype: torch.dtype, softmax: bool) -> Task:
    """The task of a recipe with a checkpoint, as it is or with softmax attention in its place."""
    training = RecipeTrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written
        do_eval=split == "validation",
        do_predict=split == "test",
        per_device_eval_batch_size=batch_size,
        report_to="none",
    )
    attention = AttentionArguments(attention=SOFTMAX if softmax else KEEP)
    task = prepare(Flags(ModelArguments(path), attention, AdaptationArguments(), data, training))
    task.model.to(device=training.device, dtype=dtype).eval()
    return task


def predict(task: Task, split: str, batch_size: int) -> tuple[Scores, int]:
    """Scores, and how many rows there are; with several processes each predicts a share, and no row twice."""
    arguments = RecipeTrainingArguments(
        output_dir=tempfile.gettempdir(), per_device_eval_batch_size=batch_size, report_to="none"
    )
    trainer = RepeatableTrainer(
        task.model, arguments, data_collator=task.collate, preprocess_logits_for_metrics=task.keep
    )
    prediction = trainer.predict(task.data[split])
    if prediction.label_ids is None:
        raise RecipeError(f"The {split} data has no labels to compare with.")
    return task.score(split, prediction), len(task.data[split])


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The mean difference of two models row by row, and its standard error."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    error = float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else float("nan")
    return {"difference": float(difference.mean()), "standard_error": error}


# -- speed and memory -------------------------------------------------------------------------------------------------
@dataclass
class Cost:
    """What predicting costs.

    Args:
        seconds: Of each pass over the timed batches.
        tokens: In them, padding left out; of images the patches.
        peak, activations: Bytes: at the peak, and of it what was not there before.
    """

    seconds: list[float]
    tokens: int
    peak: int
    activations: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens_per_second": self.tokens / statistics.median(self.seconds),
            "seconds": self.seconds,
            "tokens_timed": self.tokens,
            "peak_memory_mib": self.peak / 2**20,
            "activation_memory_mib": self.activations / 2**20,
        }


@torch.inference_mode()
def measure_cost(task: Task, split: str, batch_size: int, batches: int, repeats: int, title: str) -> Cost:
    """Time passes over batches of all lengths."""
    timed = [unlabelled(batch) for batch in _batches(task, split, batch_size, batches)]
    device = task.model.device
    _run(task.model, timed[-1])  # the longest: warms up, and reaches the peak on a GPU too
    before = memory(device, reset=True)
    for batch in timed:
        _run(task.model, batch)
    after = memory(device)
    seconds = []
    for _ in tqdm(range(repeats), desc=f"{title}: timing", leave=False):
        start = time.perf_counter()
        for batch in timed:
            _run(task.model, batch)
        seconds.append(time.perf_counter() - start)
    tokens = sum(_count_tokens(batch, task.model) for batch in timed)
    return Cost(seconds, tokens, after["peak"], max(0, after["peak"] - before["now"]))


def _batches(task: Task, split: str, batch_size: int, number: int) -> list[dict[str, Any]]:
    """So many batches of rows of similar length, spread over all lengths, short ones first."""
    data = task.data[split]
    order = list(range(len(data)))
    if "length" in data.column_names:
        lengths = data["length"]
        order.sort(key=lambda i: lengths[i])
    starts = range(0, len(order), batch_size)
    every = max(1, len(starts) // number)
    chosen = list(starts)[every // 2 :: every][:number]
    return [task.collate([data[i] for i in order[start : start + batch_size]]) for start in chosen]


def unlabelled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without its labels."""
    return {name: value for name, value in batch.items() if not is_label(name)}


def _run(model: Any, batch: Mapping[str, torch.Tensor]) -> None:
    """One pass; copying a number waits for the device."""
    first = model(**{name: value.to(model.device) for name, value in batch.items()})[0]
    first.flatten()[0].item()


def _count_tokens(batch: Mapping[str, torch.Tensor], model: Any) -> int:
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if "input_ids" in batch:
        return batch["input_ids"].numel()
    images = batch["pixel_values"]
    return (
        images.shape[0] * (images.shape[-1] // model.config.patch_size) * (images.shape[-2] // model.config.patch_size)
    )


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


def attention_of(model: Any) -> str:
    """The kind's name."""
    settings = linear_attention_of(model)
    return settings["kind"] if settings else SOFTMAX
