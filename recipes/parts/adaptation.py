"""What happens between conversion and fine-tuning: calibration, attention transfer, adapters."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SaveStrategy

import hf_linattn
from hf_linattn.cli.values import name_list
from hf_linattn.distributed.fully_sharded import copy_learned
from hf_linattn.training import AttentionTransferTrainer
from hf_linattn.training.transfer import LEARNING_RATES

from .checkpoints import last_complete
from .common import RecipeError, refuse_idle_flags
from .data import Data, first_rows, is_stream
from .kept import Kept
from .processes import prepare_sharding, strategy
from .repeatable import RepeatableTrainer

logger = logging.getLogger("hf_linattn.recipes")

Collate = Callable[[list[Any]], dict[str, Any]]


@dataclass
class AdaptationArguments:
    """What prepares a converted model for fine-tuning, and what of it is trained."""

    calibration_samples: int = field(
        default=256, metadata={"help": "Training rows that set the statistics of a kind that needs them"}
    )
    transfer_steps: int = field(
        default=0, metadata={"help": "Attention transfer first: so many steps train learned maps towards softmax"}
    )
    transfer_learning_rate: float = field(
        default=LEARNING_RATES["attention"], metadata={"help": "Of the first of these steps"}
    )
    lora_target_modules: str | None = field(
        default=None,
        metadata={"help": "Train LoRA in these modules, for example 'query,value' (BERT, ViT) or 'c_attn' (GPT-2)"},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA"})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA is scaled by alpha / rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before LoRA"})

    def __post_init__(self) -> None:
        for name, least in (("calibration_samples", 1), ("transfer_steps", 0), ("lora_r", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"--{name} must be at least {least}; got {getattr(self, name)}.")
        if not 0 <= self.lora_dropout < 1:
            raise RecipeError(f"--lora_dropout must be at least 0 and below 1; got {self.lora_dropout}.")
        lora = ("lora_r", "lora_alpha", "lora_dropout")
        refuse_idle_flags(self, {"transfer_steps": ["transfer_learning_rate"], "lora_target_modules": lora})
        if self.lora_target_modules is not None and not name_list(self.lora_target_modules):
            raise RecipeError(f"--lora_target_modules must name modules; got {self.lora_target_modules!r}.")


def adapt(
    model: PreTrainedModel,
    rows: Data,
    trained: Data,
    collate: Collate,
    args: AdaptationArguments,
    training: TrainingArguments,
    kept: Kept,
) -> dict[str, Any]:
    """Calibrate and train the attention layers on training rows, without labels. Returns what was done.

    Every process reads its share of the rows.

    Args:
        rows: Those of training: the first ones calibrate.
        trained: The same, as attention transfer reads them: a stream without end is shuffled.
        collate: From a list of rows to inputs of the model; labels among them are not looked at.
        kept: What an earlier start of the run has done of it, which is not done again.
    """
    done: dict[str, Any] = {}
    if hf_linattn.needs_calibration(model):
        chosen = first_rows(rows, args.calibration_samples)
        calibrate(model, list(chosen) if is_stream(chosen) else chosen, collate, training, kept)
        done["calibration_rows"] = args.calibration_samples if is_stream(rows) else len(chosen)
    if args.transfer_steps:
        # What FSDP2 has sharded stays so, and Accelerate cannot shard it again for the run that follows.
        is_sharded = strategy(training) == "FSDP2"
        taught = copy.deepcopy(model) if is_sharded else model
        kept.record(done)
        trainer = _transfer_trainer(taught, trained, collate, args, training, kept)
        found = last_complete(kept.transfer, trainer.args)
        if found is not None:
            logger.warning("Attention transfer goes on from %s (--from_scratch starts anew)", found)
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
        if is_sharded:
            copy_learned(taught, model)
        last = [entry for entry in trainer.state.log_history if "error" in entry][-1]
        done["transfer"] = {"steps": args.transfer_steps, "error": last["error"]}
        logger.info("Attention transfer: relative error %.3f after %d steps", last["error"], args.transfer_steps)
    if done:
        kept.record(done)
    return done


def calibrate(
    model: PreTrainedModel, rows: Sequence[Any], collate: Collate, training: TrainingArguments, kept: Kept
) -> None:
    """Set the statistics of the attention layers; every process reads its share of the rows."""
    if kept.load_calibration(model):
        return
    own = torch.arange(len(rows)).tensor_split(training.world_size)[training.process_index].tolist()
    loader = DataLoader(Subset(rows, own), batch_size=training.per_device_eval_batch_size, collate_fn=collate)
    hf_linattn.calibrate(model.to(training.device), loader, first_row=own[0] if own else len(rows))
    kept.save_calibration(model)
    logger.info("Calibrated %s on %d rows", type(model).__name__, len(rows))


class _Transfer(RepeatableTrainer, AttentionTransferTrainer):
    """Attention transfer that sees the rows in the order that the seed gives."""


def check_transfer_strategy(training: TrainingArguments) -> None:
    """Raise RecipeError where attention transfer cannot follow what splits the work."""
    if strategy(training) == "FSDP" or strategy(training).startswith("DeepSpeed"):
        raise RecipeError(
            f"Attention transfer does not run under {strategy(training)}: use DDP (ddp.yaml) or FSDP2 (fsdp2.yaml)."
        )


def _transfer_trainer(
    model: PreTrainedModel,
    rows: Data,
    collate: Collate,
    args: AdaptationArguments,
    training: TrainingArguments,
    kept: Kept,
) -> _Transfer:
    check_transfer_strategy(training)
    prepare_sharding(model)
    arguments = type(training)(
        output_dir=str(kept.transfer),
        max_steps=args.transfer_steps,
        learning_rate=args.transfer_learning_rate,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        logging_steps=min(10, args.transfer_steps),
        save_strategy="no" if training.save_strategy == SaveStrategy.NO else "steps",
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        train_sampling_strategy=training.train_sampling_strategy,
        **{name: getattr(training, name) for name in SHARED},
    )
    return _Transfer(model, arguments, train_dataset=rows, data_collator=collate)


# Of the flags of the run, those that its first stage follows too.
SHARED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "disable_tqdm",
    "dataloader_num_workers",
    "use_cpu",
    "save_steps",
    "save_on_each_node",
    "enable_jit_checkpoint",
)


def check_adapter(model: PreTrainedModel, args: AdaptationArguments) -> None:
    """Raise what `add_adapter` would raise later, after attention transfer. Builds the model anew, without values."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told when it is added
        add_adapter(type(model)(model.config), args, new_head=True)


def add_adapter(model: PreTrainedModel, args: AdaptationArguments, new_head: bool) -> nn.Module:
    """The model with LoRA around it; whole are trained its head, if that is new, and learned attention maps.

    The adapter has all that linear attention adds to the model, statistics too: a resumed run finds them there.

    Raises: RecipeError if PEFT is missing or no module has one of the names.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise RecipeError("--lora_target_modules needs PEFT: pip install peft.") from None
    assert args.lora_target_modules is not None
    wanted = list(name_list(args.lora_target_modules))
    parts = [name.split(".")[-1] for name, _ in model.named_modules()]
    if missing := [name for name in wanted if name.split(".")[-1] not in parts]:
        raise RecipeError(f"--lora_target_modules: no module is called {missing[0]!r} in {type(model).__name__}.")
    head = [name for name, _ in model.named_children() if new_head and name != model.base_model_prefix]
    head = [name for name in head if any(True for _ in getattr(model, name).parameters())]
    holds = any(".linattn." in name for name in model.state_dict())
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=wanted,
        modules_to_save=[*head, *(["linattn"] if holds else [])] or None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # a module of another sort than PEFT knows
        raise RecipeError(f"--lora_target_modules {args.lora_target_modules}: {error}") from error
