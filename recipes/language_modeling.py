"""Fine-tune a language model, or train one from scratch: causal or masked, with softmax or any linear attention.

Texts are joined and cut into rows of `--max_length` tokens; with `--packing` a row holds whole texts, none of which
sees another one. Runs with plain `python` or with `accelerate launch`, on
Hub names or local folders and files:

    python recipes/language_modeling.py --model_name_or_path openai-community/gpt2 --attention favor_plus \\
        --transfer_steps 200 --train_file train.txt --validation_file dev.txt --max_length 1024 \\
        --do_train --do_eval --num_train_epochs 1 --output_dir runs/gpt2_favor_plus

From scratch, with a tokenizer at hand:

    python recipes/language_modeling.py --model_type bert --config_overrides hidden_size=256,num_hidden_layers=4 \\
        --tokenizer_name google-bert/bert-base-uncased --attention eva --dataset_name wikitext \\
        --dataset_config_name wikitext-103-raw-v1 --streaming --max_steps 10000 \\
        --do_train --do_eval --output_dir runs/eva

Every `TrainingArguments` flag works. A run that was cut short goes on from its last complete checkpoint when it
is started again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    EvalPrediction,
    PreTrainedConfig,
    TrainerCallback,
    TrainingArguments,
)

from hf_linattn.data.files import TEXT_FORMATS
from hf_linattn.data.rows import TEXT_NAMES, packed, whole_texts
from parts.common import RecipeError, run
from parts.data import Data, DataArguments, encode, first_rows, is_stream, read_splits
from parts.finetuning import Flags, Scores, Task, fine_tune, read_flags
from parts.masking import IGNORED, MaskingCollator, next_token_collator
from parts.models import convert, extend, load_config, load_model, load_tokenizer
from parts.packing import PackingCollator, check_packing
from parts.text import LengthArguments, choose_max_length
from parts.training import NewModelArguments

logger = logging.getLogger("hf_linattn.recipes")

CAUSAL, MASKED = "causal", "masked"
AUTO_CLASSES = {CAUSAL: AutoModelForCausalLM, MASKED: AutoModelForMaskedLM}
MAPPINGS = {CAUSAL: MODEL_FOR_CAUSAL_LM_MAPPING, MASKED: MODEL_FOR_MASKED_LM_MAPPING}

LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}  # of rows


@dataclass
class LanguageModelingArguments(LengthArguments, DataArguments):
    """Which texts, and what is predicted."""

    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of every row (default: the positions of the model)"}
    )
    text_column: str | None = field(default=None, metadata={"help": f"Default: the first of {', '.join(TEXT_NAMES)}"})
    objective: str | None = field(
        default=None,
        metadata={
            "help": f"'{CAUSAL}' predicts the next token, '{MASKED}' hidden ones (default: {MASKED} where the model "
            "can, else causal)"
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are to be predicted"})
    packing: bool = field(
        default=False,
        metadata={
            "help": "Rows of whole texts, each of which sees itself alone, in place of texts joined and cut (causal "
            "models whose mask follows positions, such as GPT-2)"
        },
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Without validation data: the first so many percent of the training rows"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in (None, *MAPPINGS):
            raise RecipeError(f"--objective must be '{CAUSAL}' or '{MASKED}'; got {self.objective!r}.")
        if not 0 < self.mlm_probability < 1:
            raise RecipeError(f"--mlm_probability must be between 0 and 1; got {self.mlm_probability}.")
        if not 0 < self.validation_split_percentage < 100:
            raise RecipeError(
                f"--validation_split_percentage must be from 1 to 99; got {self.validation_split_percentage}."
            )
        if self.max_length is not None and self.max_length < 8:
            raise RecipeError(f"--max_length must be at least 8; got {self.max_length}.")

    def complete(self, splits: Mapping[str, Data]) -> Mapping[str, Data]:
        """With a validation split: that of the data, or the first rows of the training data, also if none is scored.

        So a later run that only evaluates has rows that were not trained on.
        """
        train = splits.get("train")
        if "validation" in splits or train is None or is_stream(train):
            return splits
        number = math.ceil(len(train) * self.validation_split_percentage / 100)
        parts = {"validation": range(number), "train": range(number, len(train))}
        return {**splits, **{split: train.select(rows or []) for split, rows in parts.items()}}


ARGUMENTS = LanguageModelingArguments  # for evaluate_checkpoint.py


def prepare(flags: Flags) -> Task:
    """Read texts and model; cut the texts into rows; mask those of evaluation once for all."""
    every_text = replace(flags.data, **dict.fromkeys(LIMITS.values()))
    splits = read_splits(every_text, flags.training, formats=TEXT_FORMATS)

    config = load_config(flags.model)
    objective = choose_objective(flags.data.objective, config)
    if flags.data.packing:
        check_packing(config, objective)
    if objective == CAUSAL and flags.data.mlm_probability != LanguageModelingArguments.mlm_probability:
        raise RecipeError(f"--mlm_probability {flags.data.mlm_probability} is for --objective {MASKED}, not {CAUSAL}.")
    tokenizer = load_tokenizer(flags.model, config)
    if len(tokenizer) > config.vocab_size:
        raise RecipeError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}. Leave --tokenizer_name out."
        )
    model = load_model(AUTO_CLASSES[objective], flags.model, config=config)
    extend(model, tokenizer, flags.data)
    model = convert(model, flags.attention, flags.adaptation)

    max_length = choose_max_length(flags.data.max_length, tokenizer, model.config)
    with flags.training.main_process_first(desc="cutting texts into rows"):
        how = (flags.data.text_column, tokenizer, max_length, "text_column")
        rows_of = whole_texts if flags.data.packing else packed
        data = {split: rows_of(rows, *how) for split, rows in splits.items()}
    data = {split: first_rows(rows, getattr(flags.data, LIMITS[split])) for split, rows in data.items()}
    check_rows(data, max_length)
    if objective == MASKED:
        collate: Any = MaskingCollator(tokenizer, flags.data.mlm_probability, seed_of(flags.training))
        scored = {split: rows for split, rows in data.items() if split != "train"}
        data |= encode(scored, collate.masked_once, flags.training, "masking")
    elif flags.data.packing:
        collate = PackingCollator(max_length, tokenizer.pad_token_id or 0)
    else:
        collate = next_token_collator
    return Task(
        model=model,
        processor=tokenizer,
        data=data,
        collate=collate,
        score=lambda split, prediction: score(prediction),
        main_metric="nll",
        keep=lambda logits, labels: sums(logits, labels, shifted=objective == CAUSAL),
        new_head=False,
        has_mean_loss=objective == MASKED,
        facts={"objective": objective, "max_length": max_length},
    )


def choose_objective(wanted: str | None, config: PreTrainedConfig) -> str:
    """What the model is to predict, checked against what its architecture can.

    Raises: RecipeError for an architecture that cannot.
    """
    possible = [name for name in (MASKED, CAUSAL) if type(config) in MAPPINGS[name]]
    usual = possible[:1] if not getattr(config, "is_decoder", False) else [CAUSAL]
    objective = wanted or next(iter(usual), CAUSAL)
    if objective not in possible:
        raise RecipeError(f"A model of type {config.model_type!r} has no {objective} language model.")
    if MASKED in possible and hasattr(config, "is_decoder"):
        config.is_decoder = objective == CAUSAL  # a causal BERT must not see the token that it is to predict
    return objective


def check_rows(data: Mapping[str, Data], max_length: int) -> None:
    """Say how many rows there are. Raises: RecipeError if a split has too little text for one."""
    for split, rows in data.items():
        if next(iter(rows), None) is None:
            raise RecipeError(f"The {split} data gives no row of {max_length} tokens. Use a smaller --max_length.")
        if not is_stream(rows):
            logger.info("%s: %d rows of %d tokens", split, len(rows), max_length)


def seed_of(training: TrainingArguments) -> int:
    """Of the order of the data, and of what is masked in it."""
    return training.seed if training.data_seed is None else training.data_seed


def sums(logits: Any, labels: Tensor, shifted: bool) -> Tensor:
    """Of each row the negative log-likelihood, the right predictions and all predictions, summed `[rows, 3]`.

    Row by row, so that nothing of the size of the logits `[rows, tokens, vocabulary]` is made.

    Args:
        shifted: Whether a token's logits are those of the token after it.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    found = []
    for scores, tokens in zip(logits, labels, strict=True):
        counts = tokens != IGNORED
        nll = cross_entropy(scores.float(), tokens, ignore_index=IGNORED, reduction="sum")
        right = (scores.argmax(-1) == tokens) & counts
        found.append(torch.stack([nll, right.sum(), counts.sum()]))
    return torch.stack(found)


def score(prediction: EvalPrediction) -> Scores:
    """Mean negative log-likelihood of a token (nats), perplexity, accuracy."""
    nll, right, count = np.asarray(prediction.predictions, dtype=np.float64).T
    mean = nll.sum() / count.sum()
    metrics = {
        "nll": float(mean),
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "accuracy": float(right.sum() / count.sum()),
    }
    return Scores(metrics, nll / count)


def main(
    argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe; arguments and result of `fine_tune`."""
    flags = read_flags(ARGUMENTS, argv, __doc__, quiet, model_class=NewModelArguments)
    return fine_tune(Path(__file__).stem, flags, prepare(flags), callbacks, quiet)


if __name__ == "__main__":
    run(main)
