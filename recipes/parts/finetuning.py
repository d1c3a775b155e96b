"""The course of a fine-tuning run, the same for every task, in the order of `fine_tune`.

The model comes converted from `prepare`. Without a checkpoint to go on from it is calibrated and, with the flag
`--transfer_steps`, trained towards softmax. Then LoRA is added, the model trained, LoRA merged, the model scored,
saved and published. With a checkpoint calibration and transfer are left out: the checkpoint holds their result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_linattn.training import LinAttnCallback
from hf_linattn.training.context_parallel_trainer import check_context_parallel

from .adaptation import SHARED, AdaptationArguments, Collate, adapt, add_adapter, check_adapter
from .checkpoints import find_checkpoint
from .common import AttentionArguments, RecipeError, linear_attention_of, versions
from .data import Data, DataArguments, is_stream
from .kept import Kept
from .processes import Progress, describe_processes
from .training import ModelArguments, RecipeTrainer, RecipeTrainingArguments, parse_flags, start_logging

logger = logging.getLogger("hf_linattn.recipes")


@dataclass
class Scores:
    """How good predictions are.

    Args:
        metrics: Of all rows together, by name.
        rows: The main metric, row by row, for paired comparisons `[rows]`: its mean is that of all rows, or close.
    """

    metrics: dict[str, float]
    rows: np.ndarray


@dataclass
class Task:
    """What a recipe makes of its flags: a model, and data as it takes them.

    Args:
        model: Converted, where that is asked for.
        processor: Its tokenizer or image processor.
        data: Split -> rows: "train", which may be a stream, "validation", "test", and others that begin like the last
            two. A column `length` lets rows of similar length share a batch.
        collate: From a list of rows to inputs of the model, with labels.
        score: From a split and predictions to scores.
        main_metric: Name of the metric whose rows `Scores` has.
        keep: What of a batch's logits is kept for `score`, as `preprocess_logits_for_metrics` of Trainer.
        show: From the predictions for test rows to a line of text each.
        numbered: Whether they go to `predictions.tsv`, behind the index of the row, or alone to `predictions.txt`.
        new_head: Whether the model's head begins with random weights.
        has_mean_loss: Whether the model's own loss is a mean over the rows of a batch. One of tokens counts them over
            all processes and accumulated steps.
        facts: What `results.json` says of the data, besides the flags.
        trainer: What makes its Trainer, where that has to do more than others.
    """

    model: PreTrainedModel
    processor: Any
    data: Mapping[str, Data]
    collate: Collate
    score: Callable[[str, EvalPrediction], Scores]
    main_metric: str
    keep: Callable[[Any, Any], Any] | None = None
    show: Callable[[Any], Sequence[str]] | None = None
    numbered: bool = True
    new_head: bool = True
    has_mean_loss: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    trainer: Callable[..., RecipeTrainer] = RecipeTrainer


@dataclass
class Flags:
    """The command line of a recipe; `data` is its own class, and `model` where it is no pretrained one."""

    model: Any
    attention: AttentionArguments
    adaptation: AdaptationArguments
    data: Any
    training: RecipeTrainingArguments


def read_flags(
    data_class: type[DataArguments],
    argv: Sequence[str] | None,
    description: str | None,
    quiet: bool = False,
    model_class: type[ModelArguments] = ModelArguments,
) -> Flags:
    """The flags, read; logging and the seed, set. Comes first.

    Args:
        model_class: `NewModelArguments` where models may be trained from scratch.
    """
    parts = (model_class, AttentionArguments, AdaptationArguments, data_class, RecipeTrainingArguments)
    flags = Flags(*parse_flags(parts, argv, description))
    start_logging(flags.training, quiet)
    set_seed(flags.training.seed)
    return flags


def fine_tune(
    recipe: str, flags: Flags, task: Task, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False
) -> dict[str, Any]:
    """Carry a run out. Returns what it writes to `results.json`.

    Args:
        recipe: Name of the script.
        callbacks: Of the `Trainer`, besides its own.
        quiet: Print nothing but warnings (a caller shows progress through a callback).
    """
    started = time.perf_counter()
    training, model = flags.training, task.model
    settings = linear_attention_of(model)
    for name in () if training.do_train else ("transfer_steps", "lora_target_modules"):
        if getattr(flags.adaptation, name):
            raise RecipeError(f"--{name} needs --do_train. To score a model that is trained: --attention keep.")
    checkpoint, adapted = None, {}
    if training.do_train:
        if training.context_parallel_size > 1:
            check_context_parallel(model, training, training.context_parallel_size)
        if flags.adaptation.lora_target_modules:
            check_adapter(model, flags.adaptation)
        _choose_sampling(training, task.data["train"])
        logger.info("%s", describe(task, training))
        checkpoint = find_checkpoint(
            training, settings, flags.data.from_scratch, has_adapter=bool(flags.adaptation.lora_target_modules)
        )
        kept = Kept(training, _comes_from(flags, settings), flags.data.from_scratch, checkpoint is None)
        adapted = kept.done
        if checkpoint is None:
            rows = task.data["train"]
            adapted = adapt(model, rows, _in_order(rows, flags), task.collate, flags.adaptation, training, kept)
            set_seed(training.seed)  # how much was drawn depends on what was kept
    trainer = _trainer(flags, task, callbacks)
    if quiet:
        trainer.remove_callback(PrinterCallback)

    metrics: dict[str, dict[str, float]] = {}
    if training.do_train:
        metrics["train"] = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.merge_adapter()
    for split in task.data:
        name = split.replace("validation", "eval")
        trainer.compute_metrics = partial(_metrics, task, split)
        if name.startswith("eval"):
            metrics[name] = trainer.evaluate(task.data[split], metric_key_prefix=name)
        elif name.startswith("test"):
            predicted = trainer.predict(task.data[split], metric_key_prefix=name)
            metrics[name] = predicted.metrics
            if task.show is not None and trainer.is_world_process_zero():
                write_predictions(Path(training.output_dir, name.replace("test", "predictions")), task, predicted)
    if not quiet:
        for split, values in metrics.items():
            trainer.log_metrics(split, values)

    results = {
        "recipe": recipe,
        "model": asdict(flags.model),
        "attention": settings or {"kind": "softmax"},
        "adaptation": {**asdict(flags.adaptation), **adapted},
        "data": {**asdict(flags.data), **task.facts},
        "training": trainer.settings(),
        "metrics": metrics,
        "log": trainer.state.log_history,
        "processes": training.world_size,
        "seconds": round(time.perf_counter() - started, 2),
        "versions": versions(),
    }
    # After evaluation: the card carries the metrics.
    scores = {k.removeprefix("eval_"): v for k, v in metrics.get("eval", {}).items() if _is_score(k)}
    trainer.card_facts |= {"metrics": scores, "dataset": flags.data.dataset_name}
    if training.do_train:
        trainer.save_model()  # the tokenizer too; every rank takes part, as sharded models need
        trainer.save_state()
        trainer.create_model_card()
    found = trainer.finish(results)
    if training.do_train:
        kept.remove()
    return found


def write_predictions(path: Path, task: Task, predicted: Any) -> None:
    """A line a row: its index and what was predicted, as the server of GLUE wants it, or the latter alone."""
    assert task.show is not None
    lines = list(task.show(predicted.predictions))
    if task.numbered:
        lines = ["index\tprediction", *(f"{i}\t{text}" for i, text in enumerate(lines))]
    path = path.with_suffix(".tsv" if task.numbered else ".txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    logger.info("Wrote %s", path)


def describe(task: Task, training: TrainingArguments) -> str:
    """What runs, in one line: model, kind, settings, layers, processes, device, strategy, effective batch."""
    settings = dict(linear_attention_of(task.model) or {"kind": "softmax"})
    kind, layers = settings.pop("kind"), settings.pop("layers", None)
    shown = ("learned", "num_features", "num_landmarks", "num_chunks", "chunk_size")
    shown = (*shown, "window_size", "overlap_window", "exact_below")
    sizes = ", ".join(f"{name}={settings[name]}" for name in shown if settings.get(name) not in (None, False))
    where = "" if layers is None else f" in layers {','.join(map(str, layers))}"
    return (
        f"{type(task.model).__name__}: {kind}{f' ({sizes})' if sizes else ''}{where}; {describe_processes(training)}"
    )


def _comes_from(flags: Flags, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The flags that decide what calibration and attention transfer end with."""
    adaptation = {name: value for name, value in asdict(flags.adaptation).items() if not name.startswith("lora_")}
    data = {name: value for name, value in asdict(flags.data).items() if name != "from_scratch"}
    names = (*SHARED, "train_sampling_strategy", "per_device_eval_batch_size")
    training = {name: getattr(flags.training, name) for name in names if not name.startswith(("save_", "enable_"))}
    return {**asdict(flags.model), "linear_attention": settings, **adaptation, **data, **training}


def _choose_sampling(training: RecipeTrainingArguments, rows: Data) -> None:
    """Rows of one length, and streams, have no lengths to group by."""
    if is_stream(rows) or training.length_column_name not in rows.column_names:
        if training.train_sampling_strategy == "group_by_length":
            training.train_sampling_strategy = "random"


def _in_order(rows: Data, flags: Flags) -> Data:
    """Rows to train on: of a stream shuffled ones, without end."""
    if not is_stream(rows):
        return rows
    seed = flags.training.seed if flags.training.data_seed is None else flags.training.data_seed
    return rows.shuffle(seed=seed, buffer_size=flags.data.shuffle_buffer).repeat(None)


def _trainer(flags: Flags, task: Task, callbacks: Sequence[TrainerCallback]) -> RecipeTrainer:
    training, model = flags.training, task.model
    if training.do_train and flags.adaptation.lora_target_modules:
        model = add_adapter(model, flags.adaptation, task.new_head)
    rows = task.data.get("train")
    rows = rows if rows is None else _in_order(rows, flags)
    trainer = task.trainer(
        model=model,
        args=training,
        train_dataset=rows,
        eval_dataset=task.data.get("validation"),
        processing_class=task.processor,
        data_collator=task.collate,
        compute_metrics=partial(_metrics, task, "validation"),
        preprocess_logits_for_metrics=task.keep,
        callbacks=[LinAttnCallback(), Progress(), *callbacks],
    )
    if task.has_mean_loss:
        # The heads take `num_items_in_batch` and ignore it: Trainer, believing that they divided by it, would scale
        # gradients by the number of processes and of accumulation steps.
        trainer.model_accepts_loss_kwargs = False
    trainer.card_facts = {"base_model": flags.model.base_on_hub, "repo_id": training.hub_model_id}
    return trainer


def _metrics(task: Task, split: str, prediction: EvalPrediction) -> dict[str, float]:
    return task.score(split, prediction).metrics


def _is_score(name: str) -> bool:
    """Whether a value that Trainer reports is one of the task's metrics."""
    left_out = ("_loss", "_runtime", "_per_second", "_model_preparation_time")
    return name.startswith("eval_") and not name.endswith(left_out)
