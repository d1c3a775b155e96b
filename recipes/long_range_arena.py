"""Train a small encoder from scratch on a task of Long Range Arena, with softmax or any linear attention.

The sizes are those of the small protocol (two layers of 64, two heads, the mean over the tokens); `configs/lra` has
data, steps and learning rate of every task, published (`listops.yaml`) and for one CPU core (`listops_small.yaml`):

    python recipes/build_long_range_arena.py listops --rows 4000 --seed 0 --output listops/train.parquet
    python recipes/long_range_arena.py --config recipes/configs/lra/listops_small.yaml --attention favor_plus \\
        --output_dir runs/listops_favor_plus

Every `TrainingArguments` flag works. A run that was cut short goes on from its last complete checkpoint when it
is started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import BertConfig, BertModel, TrainerCallback

from hf_linattn.data.files import column_names
from lra.data import ArenaDataArguments, published_pathfinder
from lra.model import BertForLongRangeArena
from lra.tasks import TASKS, ArenaTask, collate, encoder_of
from parts.common import RecipeError, run
from parts.data import encode, read_splits
from parts.finetuning import Flags, Task, fine_tune, read_flags
from parts.labels import Labels
from parts.metrics import CLASSIFICATION
from parts.models import convert
from text_classification import score, tell_lengths


@dataclass
class ArenaArguments:
    """Which task, and how large a model."""

    task: Literal["listops", "text", "matching", "image", "pathfinder"] = field(metadata={"help": "The task"})
    hidden_size: int = field(default=64, metadata={"help": "Width of the model"})
    num_hidden_layers: int = field(default=2, metadata={"help": "Its layers"})
    num_attention_heads: int = field(default=2, metadata={"help": "Heads of a layer"})
    intermediate_size: int = field(default=128, metadata={"help": "Width of the feed-forward layers and of the head"})
    pooling: Literal["mean", "cls"] = field(
        default="mean",
        metadata={"help": "'mean' over the tokens, as in the small protocol, or 'cls', a token put in front"},
    )
    dropout: float = field(default=0.1, metadata={"help": "Of embeddings and hidden states"})
    base_on_hub = None  # trained from scratch

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name} must be at least 1; got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise RecipeError(
                f"--hidden_size must be a multiple of --num_attention_heads; got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"--dropout must be at least 0 and below 1; got {self.dropout}.")


def encoder_config(args: ArenaArguments, task: ArenaTask, max_length: int, vocab_size: int) -> BertConfig:
    """A BERT of these sizes, for texts of one segment."""
    in_front = int(args.pooling == "cls")
    return BertConfig(
        vocab_size=vocab_size + in_front,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=args.intermediate_size,
        max_position_embeddings=max_length + in_front,
        type_vocab_size=1,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=0.0,  # linear attention has none
        pad_token_id=0,
        num_labels=task.num_labels,
        num_towers=len(task.inputs),
        pooling=args.pooling,
    )


def prepare(flags: Flags) -> Task:
    """Read the data; build the model and convert its encoder; turn rows into token ids."""
    task = TASKS[flags.model.task]
    folder = flags.data.data_dir
    given = published_pathfinder(folder, flags.data.split_seed) if folder else None
    splits = read_splits(flags.data, flags.training, given=given, **task.reading)
    inputs, label = task.columns(column_names(next(iter(splits.values()))), flags.data)
    labels = Labels(label, {i: i for i in range(task.num_labels)}, [str(i) for i in range(task.num_labels)])
    max_length = flags.data.max_length or task.max_length
    tokenizer = task.tokenizer(max_length)

    config = encoder_config(flags.model, task, max_length, len(tokenizer))
    encoder = convert(BertModel(config, add_pooling_layer=False), flags.attention, flags.adaptation)
    model = BertForLongRangeArena(encoder.config, encoder)

    to_ids = encoder_of(task, tokenizer, max_length, inputs, label)
    data = encode(splits, to_ids, flags.training, "tokenizing")
    tell_lengths(data, max_length)
    return Task(
        model=model,
        processor=tokenizer,
        data=data,
        collate=collate,
        score=lambda split, prediction: score(prediction, labels, CLASSIFICATION),
        main_metric="accuracy",
        facts={"max_length": max_length, "inputs": inputs, "label": label},
    )


def main(
    argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe; arguments and result of `fine_tune`."""
    flags = read_flags(ArenaDataArguments, argv, __doc__, quiet, model_class=ArenaArguments)
    return fine_tune(Path(__file__).stem, flags, prepare(flags), callbacks, quiet)


if __name__ == "__main__":
    run(main)
