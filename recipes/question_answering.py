"""Fine-tune a pretrained model on questions whose answers are spans of a context, with any attention.

Runs with plain `python` or with `accelerate launch`, on Hub names or local files, in SQuAD's formats (1.1 and 2.0):

    python recipes/question_answering.py --model_name_or_path google-bert/bert-base-uncased --attention favor_plus \\
        --transfer_steps 200 --dataset_name rajpurkar/squad --max_length 384 --doc_stride 128 \\
        --do_train --do_eval --num_train_epochs 2 --learning_rate 3e-5 --output_dir runs/squad

Contexts that are too long are cut into overlapping rows. With linear attention they need not be: `--no_stride
--extend_positions 4096` reads each whole. Every `TrainingArguments` flag works. A run that was cut short goes on from
its last complete checkpoint when it is started again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from hf_linattn.data.files import column_names
from parts.common import RecipeError, run
from parts.data import Data, is_stream
from parts.finetuning import Flags, Scores, Task, fine_tune, read_flags
from parts.models import convert, extend, load_config, load_model, load_tokenizer
from parts.questions import Encoder, Example, QuestionArguments, QuestionColumns, read_questions
from parts.spans import best_answers, score_answers
from parts.text import choose_max_length

logger = logging.getLogger("hf_linattn.recipes")

ARGUMENTS = QuestionArguments  # for evaluate_checkpoint.py
PLACES = ("example", "null", "offsets")  # of evaluation rows, for finding the answer's text


def prepare(flags: Flags) -> Task:
    """Read data and model; cut contexts into rows of tokens."""
    splits, columns = read_questions(flags.data, flags.training)
    config = load_config(flags.model)
    tokenizer = load_tokenizer(flags.model, config)
    if not tokenizer.is_fast:
        raise RecipeError(f"{type(tokenizer).__name__} does not say where its tokens are in a text; a fast one does.")
    model = load_model(AutoModelForQuestionAnswering, flags.model, config=config)
    extend(model, tokenizer, flags.data)
    model = convert(model, flags.attention, flags.adaptation)

    max_length = choose_max_length(flags.data.max_length, tokenizer, model.config)
    data = encode(splits, columns, tokenizer, flags.data, max_length, flags.training)
    examples = {
        split: [columns.example(row, f"Row {i} of the {split} data") for i, row in enumerate(rows)]
        for split, rows in splits.items()
        if split != "train"
    }
    places = {split: data[split].select_columns(list(PLACES)) for split in examples}
    rows = {split: each.remove_columns(list(PLACES)) if split in examples else each for split, each in data.items()}

    def answers(split: str, logits: tuple[np.ndarray, np.ndarray]) -> list[str]:
        return best_answers(examples[split], places[split], logits, flags.data)

    return Task(
        model=model,
        processor=tokenizer,
        data=rows,
        collate=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if flags.training.fp16 else None),
        score=lambda split, prediction: score(answers(split, prediction.predictions), examples[split]),
        show=lambda logits: [" ".join(text.split()) for text in answers("test", logits)],
        main_metric="f1",
        keep=lambda logits, labels: tuple(logits[:2]),  # of starts and ends, whatever else the model returns
        facts={"max_length": max_length, **asdict(columns)},
    )


def encode(
    splits: Mapping[str, Data],
    columns: QuestionColumns,
    tokenizer: PreTrainedTokenizerBase,
    args: QuestionArguments,
    max_length: int,
    training: TrainingArguments,
) -> dict[str, Data]:
    """Every split as rows of the model; those of evaluation with where their tokens are in the context."""
    found: dict[str, Data] = {}
    with training.main_process_first(desc="tokenizing"):
        for split, data in splits.items():
            encoder = Encoder(tokenizer, columns, args, max_length, split, keeps_places=split != "train")
            bar = {} if is_stream(data) else {"desc": f"Tokenizing {split}"}
            options = {"batched": True, "with_indices": True, "remove_columns": column_names(data)}
            found[split] = data.map(encoder, **options, **bar)
            if not is_stream(data):
                logger.info(
                    "%s: %d questions, %d rows of up to %d tokens", split, len(data), len(found[split]), max_length
                )
    return found


def score(answers: Sequence[str], examples: Sequence[Example]) -> Scores:
    """Exact match and F1, from 0 to 1; where some questions have no answer also F1 of those and of the others."""
    exact, overlap = score_answers(answers, examples)
    metrics = {"exact_match": float(exact.mean()), "f1": float(overlap.mean())}
    answerable = np.array([bool(example.answers) for example in examples])
    if not answerable.all():
        metrics["no_answer_f1"] = float(overlap[~answerable].mean())
        if answerable.any():
            metrics["has_answer_f1"] = float(overlap[answerable].mean())
    return Scores(metrics, overlap)


def main(
    argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe; arguments and result of `fine_tune`."""
    flags = read_flags(ARGUMENTS, argv, __doc__, quiet)
    return fine_tune(Path(__file__).stem, flags, prepare(flags), callbacks, quiet)


if __name__ == "__main__":
    run(main)
