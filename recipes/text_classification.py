"""Fine-tune a pretrained model on text classification, with softmax or any linear attention.

Runs with plain `python` or with `accelerate launch`, on Hub names or local folders and files:

    python recipes/text_classification.py --model_name_or_path google-bert/bert-base-uncased --attention favor_sharp \\
        --train_file train.parquet --validation_file dev.parquet --max_length 512 \\
        --do_train --do_eval --eval_strategy epoch --num_train_epochs 2 --output_dir runs/favor_sharp

Every `TrainingArguments` flag works. A run that was cut short goes on from its last complete checkpoint when it
is started again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction, TrainerCallback

from parts.common import RecipeError, run
from parts.data import Data, DataArguments, encode, is_stream, read_splits
from parts.finetuning import Flags, Scores, Task, fine_tune, read_flags
from parts.glue import DATASET, TASKS
from parts.labels import Labels, read_labels, without_missing_labels
from parts.metrics import CLASSIFICATION, REGRESSION, LocalMetrics
from parts.models import convert, extend, load_config, load_model, load_tokenizer
from parts.text import ColumnArguments, choose_max_length, find_columns, tokenizer_function

logger = logging.getLogger("hf_linattn.recipes")


@dataclass
class TextArguments(ColumnArguments, DataArguments):
    """Which texts and labels, and how they are read."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": f"A task of GLUE ({', '.join(TASKS)}): its columns and metrics; without files its data on the Hub"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_name is None:
            return
        if self.task_name not in TASKS:
            raise RecipeError(f"--task_name must be one of {', '.join(TASKS)}; got {self.task_name!r}.")
        task = TASKS[self.task_name]
        self.text_column = self.text_column or task.text
        self.text_pair_column = self.text_pair_column or task.pair
        if not any((self.dataset_name, self.train_file, self.validation_file, self.test_file)):
            self.dataset_name, self.dataset_config_name = DATASET, self.task_name

    def splits(self) -> dict[str, tuple[str, ...]]:
        """What the splits are called on the Hub."""
        if self.task_name is None or self.dataset_name is None:
            return {}
        return {"validation": TASKS[self.task_name].validation, "test": TASKS[self.task_name].test}

    def metrics(self, labels: Labels) -> tuple[str, ...]:
        """Names, the one that counts first."""
        if self.task_name is not None:
            return TASKS[self.task_name].metrics
        return REGRESSION if labels.is_regression else CLASSIFICATION


ARGUMENTS = TextArguments  # for evaluate_checkpoint.py


def prepare(flags: Flags) -> Task:
    """Read data and model; map labels to the model's outputs; tokenize."""
    splits = read_splits(flags.data, flags.training, names=flags.data.splits())
    columns = find_columns(splits, flags.data)
    splits = without_missing_labels(splits, columns.label)

    config = load_config(flags.model)
    labels = read_labels(splits, columns.label, config, trains=flags.training.do_train)
    tokenizer = load_tokenizer(flags.model, config)
    options = {"config": config, "ignore_mismatched_sizes": labels.new_head}
    model = load_model(AutoModelForSequenceClassification, flags.model, **options)
    extend(model, tokenizer, flags.data)
    model = convert(model, flags.attention, flags.adaptation)

    max_length = choose_max_length(flags.data.max_length, tokenizer, model.config)
    tokenize = tokenizer_function(tokenizer, columns, labels, max_length)
    data = encode(splits, tokenize, flags.training, "tokenizing")
    tell_lengths(data, max_length)
    metrics = flags.data.metrics(labels)
    return Task(
        model=model,
        processor=tokenizer,
        data=data,
        collate=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if flags.training.fp16 else None),
        score=lambda split, prediction: score(prediction, labels, metrics),
        show=lambda logits: [labels.name(each) for each in answers(logits, labels)],
        main_metric=metrics[0],
        facts={"max_length": max_length, "labels": labels.to_dict(), **asdict(columns)},
    )


def tell_lengths(data: Mapping[str, Data], max_length: int) -> None:
    """How many rows of each split are cut, in the log."""
    for split, rows in data.items():
        if not is_stream(rows):
            longest = sum(length >= max_length for length in rows["length"])
            logger.info("%s: %d rows, %d of %d tokens (cut there if longer)", split, len(rows), longest, max_length)


def answers(logits: Any, labels: Labels) -> np.ndarray:
    """The model's outputs, or numbers, `[rows]`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits[:, 0] if labels.is_regression else logits.argmax(-1)


def score(prediction: EvalPrediction, labels: Labels, metrics: Sequence[str]) -> Scores:
    """The metrics; row by row whether an answer is right, of a regression the negative squared error."""
    found, true = answers(prediction.predictions, labels), np.asarray(prediction.label_ids).reshape(-1)
    values = LocalMetrics(metrics, len(labels.names)).compute(predictions=found, references=true)
    rows = -((found - true) ** 2) if labels.is_regression else (found == true).astype(float)
    return Scores(values, rows)


def main(
    argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe; arguments and result of `fine_tune`."""
    flags = read_flags(ARGUMENTS, argv, __doc__, quiet)
    return fine_tune(Path(__file__).stem, flags, prepare(flags), callbacks, quiet)


if __name__ == "__main__":
    run(main)
