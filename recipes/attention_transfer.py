"""Attention transfer: convert a pretrained model, and train what its linear attention learns towards softmax.

Without labels, on any texts or images, with plain `python`, `accelerate launch` or `torchrun`:

    python recipes/attention_transfer.py --model_name_or_path openai-community/gpt2 --attention favor_sharp \\
        --train_file train.parquet --max_length 512 --per_device_train_batch_size 4 --max_steps 200 \\
        --do_train --do_eval --ablations --output_dir runs/gpt2_favor_sharp

The kinds get their learned maps (`learned=True`); all other weights stay as they are. `--do_eval` compares with
softmax before and after, on rows that were not trained on. Every `TrainingArguments` flag works. A run that was cut
short goes on from its last complete checkpoint when it is started again.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

import hf_linattn
from hf_linattn.cli.checkpoints import model_class
from hf_linattn.distributed.fully_sharded import copy_learned
from hf_linattn.hub import TransferRecord
from parts.adaptation import calibrate, check_transfer_strategy
from parts.checkpoints import find_checkpoint
from parts.common import (
    AttentionArguments,
    RecipeError,
    apply_attention,
    layer_list,
    linear_attention_of,
    run,
    versions,
)
from parts.kept import Kept
from parts.models import load_config, load_model, load_processor, load_vocabulary
from parts.processes import Progress, describe_processes, strategy
from parts.training import ModelArguments, parse_flags, start_logging
from parts.transfer_stages import TransferArguments, TransferTrainer, TransferTrainingArguments
from parts.unlabelled import Rows, UnlabelledArguments, read_rows, takes_images

logger = logging.getLogger("hf_linattn.recipes")


# -- model ------------------------------------------------------------------------------------------------------------
def load(args: ModelArguments, attention: AttentionArguments) -> tuple[PreTrainedModel, Any]:
    """The model with the head it was saved with, converted, in float32; its tokenizer or image processor."""
    config = load_config(args)
    model = load_model(model_class(config), args, config)
    model = apply_attention(model, attention, learned=True)
    if linear_attention_of(model) is None:
        raise RecipeError(
            f"{type(model).__name__} has softmax attention, and keeps it with --attention {attention.attention}. Name "
            f"the kind that is to be trained: --attention {' | '.join(hf_linattn.list_kinds())}."
        )
    return model, load_processor(AutoImageProcessor, args) if takes_images(model) else load_vocabulary(args)


def count_steps(training: TransferTrainingArguments, rows: Rows, streaming: bool) -> int:
    """Steps of the first stage: `--max_steps`, or those of `--num_train_epochs`."""
    if training.max_steps > 0:
        return training.max_steps
    if streaming:
        raise RecipeError(
            f"With --streaming give --max_steps in place of --num_train_epochs {training.num_train_epochs:g}: nobody "
            "knows how many rows a stream has."
        )
    rows_per_step = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    return math.ceil(training.num_train_epochs * math.ceil(len(rows.train) / rows_per_step))


# -- comparison -------------------------------------------------------------------------------------------------------
def compare(model: PreTrainedModel, rows: Rows, training: TransferTrainingArguments, ablations: bool) -> Any:
    """The report on the held-out rows, with the perplexity of a language model."""
    loader = DataLoader(rows.held_out, batch_size=training.per_device_eval_batch_size, collate_fn=rows.collate)
    score = partial(perplexity, loader) if model.can_generate() else None
    model.to(training.device)
    return hf_linattn.compare(model, loader, ablations=ablations, score=score, progress=not training.disable_tqdm)


def perplexity(batches: Iterable[Mapping[str, Any]], model: PreTrainedModel) -> float:
    """Of the tokens of rows that all have the same length."""
    losses, rows = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        losses += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids)
        rows += len(ids)
    return math.exp(losses / rows)


def verdict(report: Any) -> str | None:
    """Whether the slots matter, in words; None if that is not known."""
    return None if report is None or report.is_window_in_disguise is None else report.verdict()


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
    parts = (ModelArguments, AttentionArguments, UnlabelledArguments, TransferArguments, TransferTrainingArguments)
    model_args, attention_args, data_args, transfer_args, training_args = parse_flags(parts, argv, __doc__)
    start_logging(training_args, quiet)
    if not (training_args.do_train or training_args.do_eval):
        raise RecipeError("Nothing to do: give --do_train (transfer), --do_eval (compare with softmax), or both.")
    if transfer_args.ablations and not training_args.do_eval:
        raise RecipeError("--ablations needs --do_eval, which compares with softmax.")
    set_seed(training_args.seed)

    model, processor = load(model_args, attention_args)
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    with training_args.main_process_first(desc="reading the data"):
        rows = read_rows(model, processor, data_args, seed)
    logger.info("%s; %s", type(model).__name__, describe_processes(training_args))
    steps = count_steps(training_args, rows, data_args.streaming)
    training_args.max_steps = steps + transfer_args.second_stage_steps
    checkpoint = None
    if training_args.do_train:
        checkpoint = find_checkpoint(training_args, linear_attention_of(model), data_args.from_scratch)
    calibration_rows = 0
    comes_from = {
        **asdict(model_args),
        **asdict(data_args),
        "linear_attention": linear_attention_of(model),
        "seed": seed,
    }
    kept = Kept(training_args, {**comes_from, "from_scratch": None}, data_args.from_scratch)
    if hf_linattn.needs_calibration(model):
        calibrate(model, rows.calibration, rows.collate, training_args, kept)
        calibration_rows = len(rows.calibration)

    check_transfer_strategy(training_args)
    # One process compares, which needs the whole model.
    is_sharded = strategy(training_args) == "FSDP2"
    trainer = TransferTrainer(
        model=copy.deepcopy(model) if is_sharded else model,
        args=training_args,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=processor,
        data_collator=rows.collate,
        callbacks=[Progress(), *callbacks],
        layers=layer_list(transfer_args.transfer_layers, "transfer_layers"),
        row_weight=transfer_args.row_weight,
        second_stage_steps=transfer_args.second_stage_steps,
        second_stage_learning_rate=transfer_args.second_stage_learning_rate,
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    trainer.card_facts = {"base_model": model_args.base_on_hub, "repo_id": training_args.hub_model_id}

    # One process compares; the others wait where the training begins.
    compares = training_args.do_eval and trainer.is_world_process_zero()
    reports: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    if training_args.do_train:
        if compares:
            reports["before"] = compare(model, rows, training_args, ablations=False)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
        if is_sharded:
            copy_learned(trainer.model, model)
        if not quiet:
            trainer.log_metrics("train", metrics)
    if compares:
        reports["after"] = compare(model, rows, training_args, ablations=transfer_args.ablations)
        logger.info("%s", reports["after"].to_markdown())
    fidelity = {name: report.to_dict() for name, report in reports.items()}

    results = {
        "recipe": Path(__file__).stem,
        "model": asdict(model_args),
        "attention": linear_attention_of(model),
        "data": {**asdict(data_args), "rows": rows.unit, "held_out": len(rows.held_out)},
        "transfer": {**asdict(transfer_args), "first_stage_steps": steps},
        "training": trainer.settings(),
        "metrics": metrics,
        "fidelity": fidelity,
        "log": trainer.state.log_history,
        "processes": training_args.world_size,
        "seconds": round(time.perf_counter() - started, 2),
        "versions": versions(),
    }
    if training_args.do_train:
        trainer.card_facts["transfer"] = TransferRecord(
            steps=steps,
            second_stage_steps=transfer_args.second_stage_steps,
            rows_per_step=trainer.get_total_train_batch_size(training_args),
            rows=rows.unit,
            data=data_args.source,
            layers=layer_list(transfer_args.transfer_layers, "transfer_layers"),
            learning_rate=training_args.learning_rate,
            seed=seed,
            calibration_rows=calibration_rows,
            score_name="perplexity",
            verdict=verdict(reports.get("after")),
            **fidelity,
        )
        trainer.create_model_card()
    found = trainer.finish(results)
    kept.remove()
    return found


if __name__ == "__main__":
    run(main)
