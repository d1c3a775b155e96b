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
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import hf_linattn
from _checkpoints import find_checkpoint
from _common import (
    AttentionArguments,
    ClassificationMetrics,
    RecipeError,
    apply_attention,
    linear_attention_of,
    load_splits,
    run,
    versions,
    write_json,
)
from _text import (
    ColumnArguments,
    Columns,
    checkpoint_index,
    choose_max_length,
    find_columns,
    find_labels,
    label_names,
    tokenizer_function,
)
from _training import (
    ModelArguments,
    RecipeTrainer,
    RecipeTrainingArguments,
    calibrate,
    parse_flags,
    start_logging,
)
from hf_linattn.training import LinAttnCallback

logger = logging.getLogger("hf_linattn.recipes")


@dataclass
class DataArguments(ColumnArguments):
    """Which data, and how it is read."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or a local folder"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration"})
    train_file: str | None = field(default=None, metadata={"help": "parquet, csv, tsv, json or jsonl"})
    validation_file: str | None = field(default=None, metadata={"help": "parquet, csv, tsv, json or jsonl"})
    test_file: str | None = field(
        default=None, metadata={"help": "parquet, csv, tsv, json or jsonl; for --do_predict"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first so many"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first so many"})
    calibration_samples: int = field(
        default=256, metadata={"help": "Training rows that set the statistics of a kind that needs them"}
    )
    from_scratch: bool = field(default=False, metadata={"help": "Ignore checkpoints that are in the output folder"})


# -- the run's data ---------------------------------------------------------------------------------------------------
def choose_splits(
    splits: datasets.DatasetDict, data: DataArguments, training: TrainingArguments
) -> datasets.DatasetDict:
    """The splits that the run needs, each cut to its maximal size."""
    needed = {
        "train": (training.do_train, data.max_train_samples),
        "validation": (training.do_eval, data.max_eval_samples),
        "test": (training.do_predict, data.max_predict_samples),
    }
    if not any(wanted for wanted, _ in needed.values()):
        raise RecipeError("Nothing to do: give --do_train, --do_eval or --do_predict.")
    chosen = datasets.DatasetDict()
    for split, (wanted, limit) in needed.items():
        if not wanted:
            continue
        if split not in splits:
            raise RecipeError(f"The run needs {split} data, but there is only {list(splits)}. Give --{split}_file.")
        rows = splits[split]
        chosen[split] = rows.select(range(min(limit, len(rows)))) if limit is not None else rows
    return chosen


# -- model ------------------------------------------------------------------------------------------------------------
def load(
    args: ModelArguments, attention: AttentionArguments, splits: datasets.DatasetDict, columns: Columns
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[Any, int]]:
    """Model (converted, if asked for), tokenizer and the model's index of each label."""
    source = {"revision": args.model_revision}
    config = AutoConfig.from_pretrained(args.model_name_or_path, **source)
    labels = find_labels(splits, columns.label)
    names = label_names(splits, columns.label, labels)
    index = checkpoint_index(labels, names, config)
    if index is None:  # a new head
        index = {label: i for i, label in enumerate(labels)}
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification"
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path, **source)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, config=config, **source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return apply_attention(model, attention), tokenizer, index


# -- the run ----------------------------------------------------------------------------------------------------------
def main(
    argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe. Returns what it writes to `results.json`.

    Args:
        argv: Command line; that of the program by default.
        callbacks: Of the `Trainer`, besides its own.
        quiet: Print nothing but warnings (a caller shows progress through a callback).
    """
    started = time.perf_counter()
    parts = (ModelArguments, AttentionArguments, DataArguments, RecipeTrainingArguments)
    model_args, attention_args, data_args, training_args = parse_flags(parts, argv, __doc__)
    start_logging(training_args, quiet)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="reading the data"):
        files = {s: getattr(data_args, f"{s}_file") for s in ("train", "validation", "test")}
        splits = load_splits(files, data_args.dataset_name, data_args.dataset_config_name)
    splits = choose_splits(splits, data_args, training_args)
    columns = find_columns(splits, data_args)
    model, tokenizer, index = load(model_args, attention_args, splits, columns)
    max_length = choose_max_length(data_args.max_length, tokenizer, model.config)
    checkpoint = None
    if training_args.do_train:
        checkpoint = find_checkpoint(training_args, linear_attention_of(model), data_args.from_scratch)

    tokenize = tokenizer_function(tokenizer, columns, index, max_length)
    with training_args.main_process_first(desc="tokenizing"):
        encoded = datasets.DatasetDict(
            {
                split: data.map(tokenize, batched=True, remove_columns=data.column_names, desc=f"Tokenizing {split}")
                for split, data in splits.items()
            }
        )
    for split, data in encoded.items():
        cut = sum(length >= max_length for length in data["length"])
        logger.info("%s: %d rows, %d of them of %d tokens (cut there if longer)", split, len(data), cut, max_length)

    metric = ClassificationMetrics(num_labels=model.config.num_labels)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return metric.compute(predictions=logits.argmax(-1), references=prediction.label_ids)

    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if training_args.fp16 else None)
    if training_args.do_train and hf_linattn.needs_calibration(model):
        rows = encoded["train"].select(range(min(data_args.calibration_samples, len(encoded["train"]))))
        names = [name for name in rows.column_names if name in tokenizer.model_input_names]
        calibrate(model, rows.select_columns(names), collate, training_args)
    trainer = RecipeTrainer(
        model=model,
        args=training_args,
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
        data_collator=collate,
        compute_metrics=compute_metrics,
        callbacks=[LinAttnCallback(), *callbacks],
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    # Classification heads take `num_items_in_batch` and ignore it: Trainer, believing that they divided by it, would
    # scale gradients by the number of processes and of accumulation steps.
    trainer.model_accepts_loss_kwargs = False
    trainer.card_facts = {
        "base_model": model_args.base_on_hub,
        "repo_id": training_args.hub_model_id,
    }

    metrics: dict[str, dict[str, float]] = {}
    if training_args.do_train:
        metrics["train"] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if training_args.do_eval:
        metrics["eval"] = trainer.evaluate()
    if training_args.do_predict:
        metrics["test"] = trainer.predict(encoded["test"], metric_key_prefix="test").metrics
    if not quiet:
        for split, values in metrics.items():
            trainer.log_metrics(split, values)

    results = {
        "recipe": Path(__file__).stem,
        "model": asdict(model_args),
        "attention": linear_attention_of(model) or {"kind": "softmax"},
        "data": {
            **asdict(data_args),
            "max_length": max_length,
            "labels": {str(k): v for k, v in index.items()},
            **asdict(columns),
        },
        "training": trainer.settings(),
        "metrics": metrics,
        "log": trainer.state.log_history,
        "processes": training_args.world_size,
        "seconds": round(time.perf_counter() - started, 2),
        "versions": versions(),
    }
    # After evaluation: the card carries the metrics.
    scores = {
        k.removeprefix("eval_"): v for k, v in metrics.get("eval", {}).items() if k in ("eval_accuracy", "eval_f1")
    }
    trainer.card_facts |= {"metrics": scores, "dataset": data_args.dataset_name}
    if training_args.do_train:
        trainer.save_model()  # the tokenizer too; every rank takes part, as sharded models need
        trainer.save_state()
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        path = write_json(Path(training_args.output_dir) / "results.json", results)
        logger.info("Wrote %s", path)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return results


if __name__ == "__main__":
    run(main)
