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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction, TrainerCallback

from _common import ClassificationMetrics, run
from _data import Data, DataArguments, encode, is_stream, read_splits
from _finetuning import Flags, Scores, Task, fine_tune, read_flags
from _models import convert, extend, load_config, load_model, load_tokenizer
from _text import (
    ColumnArguments,
    checkpoint_index,
    choose_max_length,
    find_columns,
    find_labels,
    label_names,
    tokenizer_function,
)

logger = logging.getLogger("hf_linattn.recipes")


@dataclass
class TextArguments(ColumnArguments, DataArguments):
    """Which texts and labels, and how they are read."""


def prepare(flags: Flags) -> Task:
    """Read data and model; map labels to the model's outputs; tokenize."""
    splits = read_splits(flags.data, flags.training)
    columns = find_columns(splits, flags.data)
    labels = find_labels(splits, columns.label)
    names = label_names(splits, columns.label, labels)

    config = load_config(flags.model)
    index = checkpoint_index(labels, names, config)
    if index is None:  # a new head
        index = {label: i for i, label in enumerate(labels)}
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification"
    tokenizer = load_tokenizer(flags.model, config)
    model = load_model(AutoModelForSequenceClassification, flags.model, config=config)
    extend(model, tokenizer, flags.data)
    model = convert(model, flags.attention, flags.adaptation)

    max_length = choose_max_length(flags.data.max_length, tokenizer, model.config)
    tokenize = tokenizer_function(tokenizer, columns, index, max_length)
    data = encode(splits, tokenize, flags.training, "tokenizing")
    tell_lengths(data, max_length)
    return Task(
        model=model,
        processor=tokenizer,
        data=data,
        collate=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if flags.training.fp16 else None),
        score=lambda split, prediction: score(prediction, model.config.num_labels),
        main_metric="accuracy",
        facts={"max_length": max_length, "labels": {str(k): v for k, v in index.items()}, **asdict(columns)},
    )


def tell_lengths(data: Mapping[str, Data], max_length: int) -> None:
    """How many rows of each split are cut, in the log."""
    for split, rows in data.items():
        if not is_stream(rows):
            cut = sum(length >= max_length for length in rows["length"])
            logger.info("%s: %d rows, %d of %d tokens (cut there if longer)", split, len(rows), cut, max_length)


def score(prediction: EvalPrediction, num_labels: int) -> Scores:
    """Accuracy and F1."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    chosen, labels = logits.argmax(-1), np.asarray(prediction.label_ids)
    metrics = ClassificationMetrics(num_labels).compute(predictions=chosen, references=labels)
    return Scores(metrics, (chosen == labels).astype(float))


def main(
    argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe; arguments and result of `fine_tune`."""
    flags = read_flags(TextArguments, argv, __doc__, quiet)
    return fine_tune(Path(__file__).stem, flags, prepare(flags), callbacks, quiet)


if __name__ == "__main__":
    run(main)
