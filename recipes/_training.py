"""What the training recipes share: flags of model and Trainer, the Trainer itself, calibration, the log."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch.utils.data import DataLoader, Subset
from transformers import HfArgumentParser, PreTrainedModel, TrainerCallback, TrainingArguments

import hf_linattn
from _common import linear_attention_of
from _data_order import RepeatableTrainer
from _publish import Publisher
from hf_linattn.hub import write_card

logger = logging.getLogger("hf_linattn.recipes")


# -- flags ------------------------------------------------------------------------------------------------------------
@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str = field(metadata={"help": "Hub name or local folder; stock or already converted"})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer or image processor, if it is not with the model"}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub"})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub name for the model card, if the path is local"}
    )

    @property
    def base_on_hub(self) -> str | None:
        """Hub name of the model that the run starts from; None for a local folder."""
        local = Path(self.model_name_or_path).exists()
        return self.base_model or (None if local else self.model_name_or_path)


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """`TrainingArguments` that put texts of similar length into a batch, and need no `--use_cpu` without a GPU."""

    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "'group_by_length' or 'random' (or another that Trainer knows)"}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise --bf16 is refused
            self.dataloader_pin_memory = False
        super().__post_init__()


def parse_flags(parts: Sequence[type], argv: Sequence[str] | None, description: str | None) -> tuple[Any, ...]:
    """One instance of each dataclass: from the command line, or from the JSON file that is its only argument."""
    parser = HfArgumentParser(parts, description=description)
    argv = list(sys.argv[1:] if argv is None else argv)
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    return parser.parse_args_into_dataclasses(args=argv)


def start_logging(training: TrainingArguments, quiet: bool) -> None:
    """One process tells what happens; with `quiet` it only warns."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.ERROR if not training.should_log else logging.WARNING if quiet else logging.INFO)
    if not training.should_log:
        transformers.utils.logging.set_verbosity_error()
        datasets.utils.disable_progress_bars()


# -- the Trainer ------------------------------------------------------------------------------------------------------
class RecipeTrainer(RepeatableTrainer):
    """A `Trainer` with the model card of the library, which uploads nothing but model, tokenizer and card."""

    card_facts: dict[str, Any]

    def __init__(self, *, args: TrainingArguments, callbacks: Sequence[TrainerCallback] = (), **kwargs: Any) -> None:
        self.publisher = Publisher(args)
        super().__init__(args=args, callbacks=[*callbacks, self.publisher], **kwargs)
        self.publisher.trainer = self

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.hub_model_id is None:
            self.args.hub_private_repo = self.args.hub_private_repo if private is None else private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self.publisher.finish()
        return self.publisher.push(blocking, commit_message=commit_message, token=token, revision=revision)

    def create_model_card(self, **kwargs: Any) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if linear_attention_of(model) is None:
            path = Path(self.args.output_dir, "README.md")
            if self.is_world_process_zero() and path.is_symlink():  # Trainer would write to its target
                path.unlink()
            super().create_model_card(**kwargs)
        elif self.is_world_process_zero():
            write_card(model, self.args.output_dir, **self.card_facts)

    def settings(self) -> dict[str, Any]:
        """The flags of the Trainer for a results file, without tokens."""
        return {**json.loads(self.args.to_json_string()), "hub_strategy": self.publisher.strategy.value}


# -- calibration ------------------------------------------------------------------------------------------------------
def calibrate(
    model: PreTrainedModel, rows: Sized, collate: Callable[[list[Any]], Any], training: TrainingArguments
) -> None:
    """Set the statistics of the attention layers; every process reads its share of the rows.

    Args:
        rows: Inputs of the model, by index.
        collate: From a list of rows to a batch.
    """
    own = torch.arange(len(rows)).tensor_split(training.world_size)[training.process_index].tolist()
    loader = DataLoader(Subset(rows, own), batch_size=training.per_device_eval_batch_size, collate_fn=collate)
    hf_linattn.calibrate(model.to(training.device), loader)
    logger.info("Calibrated %s on %d rows", type(model).__name__, len(rows))
