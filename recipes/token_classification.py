"""Fine-tune a pretrained model to tag words (entities, parts of speech), with softmax or any linear attention.

A row has a list of words and a list of as many tags; in CoNLL files a line has a word and its tag. Runs with plain
`python` or with `accelerate launch`, on Hub names or local folders and files:

    python recipes/token_classification.py --model_name_or_path google-bert/bert-base-cased --attention eva \\
        --dataset_name wikiann --dataset_config_name en --text_column tokens --label_column ner_tags \\
        --do_train --do_eval --eval_strategy epoch --num_train_epochs 3 --output_dir runs/wikiann_eva

Every `TrainingArguments` flag works. A run that was cut short goes on from its last complete checkpoint when it
is started again.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from hf_linattn.data.files import TAGGED_FORMATS, column_names, find_column
from parts.common import RecipeError, run
from parts.data import Data, DataArguments, encode, is_stream, read_splits
from parts.finetuning import Flags, Scores, Task, fine_tune, read_flags
from parts.labels import Labels, find_label_column, read_labels
from parts.metrics import CLASSIFICATION, LocalMetrics
from parts.models import convert, extend, load_config, load_model, load_tokenizer
from parts.text import LengthArguments, choose_max_length

logger = logging.getLogger("hf_linattn.recipes")

WORD_NAMES = ("tokens", "words", "text")
TAG_NAMES = ("ner_tags", "tags", "labels", "pos_tags", "upos", "chunk_tags")
FORMATS_HELP = "parquet, json or jsonl; conll or txt: a word a line, its tag in the last column, sentences apart"
SPACE_BEFORE_WORDS = ("gpt2", "roberta", "bloom", "deberta")  # their tokenizers take words apart from sentences
IGNORED = -100  # a label that is neither trained nor scored


@dataclass
class TaggingArguments(LengthArguments, DataArguments):
    """Which words and tags, and how they are read."""

    train_file: str | None = field(default=None, metadata={"help": FORMATS_HELP})
    validation_file: str | None = field(default=None, metadata={"help": FORMATS_HELP})
    test_file: str | None = field(
        default=None, metadata={"help": "In the same formats, with tags or without; for --do_predict"}
    )
    text_column: str | None = field(
        default=None, metadata={"help": f"Lists of words; default: the first of {', '.join(WORD_NAMES)}"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": f"Lists of tags; default: the first of {', '.join(TAG_NAMES)}"}
    )
    label_all_tokens: bool = field(
        default=False, metadata={"help": "Tag every token of a word, not its first one alone (B- becomes I-)"}
    )


ARGUMENTS = TaggingArguments  # for evaluate_checkpoint.py


def prepare(flags: Flags) -> Task:
    """Read words, tags and model; map tags to the model's outputs; tokenize."""
    splits = read_splits(flags.data, flags.training, formats=TAGGED_FORMATS)
    words, tags = find_columns(splits, flags.data)

    config = load_config(flags.model)
    if type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise RecipeError(f"A model of type {config.model_type!r} cannot tag tokens.")
    tagged = {split: data for split, data in splits.items() if tags in column_names(data)}
    labels = read_labels(flattened(tagged, tags), tags, config, trains=flags.training.do_train)
    if labels.is_regression:
        raise RecipeError(f"Column {tags!r} must hold tags (whole numbers or text); it holds fractions.")
    metrics = choose_metrics(labels)
    options = {"add_prefix_space": True} if config.model_type.endswith(SPACE_BEFORE_WORDS) else {}
    tokenizer = load_tokenizer(flags.model, config, **options)
    options = {"config": config, "ignore_mismatched_sizes": labels.new_head}
    model = load_model(AutoModelForTokenClassification, flags.model, **options)
    extend(model, tokenizer, flags.data)
    model = convert(model, flags.attention, flags.adaptation)

    max_length = choose_max_length(flags.data.max_length, tokenizer, model.config)
    tokenize = tagging_function(tokenizer, words, labels, max_length, flags.data.label_all_tokens)
    data = encode(splits, tokenize, flags.training, "tokenizing")
    starts = data["test"]["starts"] if "test" in data else []
    data = tell_cut_words(data, max_length)

    def tags_of(outputs: np.ndarray) -> list[str]:
        """A line a row, a tag a word; rows without words have an empty line."""
        found = iter([" ".join(labels.name(row[i]) for i in at) for row, at in zip(outputs, starts, strict=True)])
        return [next(found) if row else "" for row in splits["test"][words]]

    return Task(
        model=model,
        processor=tokenizer,
        data=data,
        collate=DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8 if flags.training.fp16 else None),
        score=lambda split, prediction: score(prediction, metrics),
        main_metric="accuracy",
        keep=lambda logits, labels: (logits[0] if isinstance(logits, tuple) else logits).argmax(-1),
        show=tags_of,
        numbered=False,
        facts={"max_length": max_length, "labels": labels.to_dict(), "text": words, "label": tags},
    )


# -- columns ----------------------------------------------------------------------------------------------------------
def find_columns(splits: Mapping[str, Data], args: TaggingArguments) -> tuple[str, str | None]:
    """Names of the columns of words and tags, the same in every split. Test data may have no tags."""
    names = column_names(next(iter(splits.values())))
    words = find_column(names, args.text_column, WORD_NAMES, "text_column")
    tags = find_label_column(splits, args.label_column, TAG_NAMES)
    for split, data in splits.items():
        for name in (words, *([tags] if tags and split != "test" else [])):
            if name not in column_names(data):
                raise RecipeError(f"The {split} data has no column {name!r}; its columns: {column_names(data)}.")
    return words, tags


def lists(rows: Mapping[str, list[Any]], column: str, what: str) -> list[list[Any]]:
    """The lists of a column. Raises: RecipeError for anything else."""
    for value in rows[column]:
        if not isinstance(value, list):
            raise RecipeError(f"Column {column!r} must hold lists of {what}; got {value!r}.")
    return rows[column]


def flattened(splits: Mapping[str, Data], column: str) -> dict[str, Data]:
    """One tag a row."""

    def flatten(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {column: [tag for tags in lists(rows, column, "tags") for tag in tags]}

    found = {}
    for split, data in splits.items():
        inner = getattr((data.features or {}).get(column), "feature", None)
        features = datasets.Features({column: inner}) if inner is not None else None
        found[split] = data.map(flatten, batched=True, remove_columns=column_names(data), features=features)
    return found


# -- tokens -----------------------------------------------------------------------------------------------------------
def tagging_function(
    tokenizer: PreTrainedTokenizerBase, column: str, labels: Labels, max_length: int, label_all_tokens: bool
) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    """What turns a batch of rows into model inputs, with labels where there are tags.

    It also says where words start (`starts`), and how many were cut off (`cut`). The tag of a word is the label of its
    first token; with `label_all_tokens` that of all, where the beginning of an entity (B-) is followed by its inside
    (I-). Rows without words are left out.
    """
    if not tokenizer.is_fast:
        raise RecipeError(f"Only a fast tokenizer says which word a token is of; {type(tokenizer).__name__} is none.")
    inside = inside_of(labels.names)

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        has_tags, all_words = labels.column in rows, lists(rows, column, "words")
        all_tags = rows[labels.column] if has_tags else all_words
        pairs = [pair for pair in zip(all_words, all_tags, strict=True) if pair[0]]
        for words, tags in pairs:
            if len(words) != len(tags):
                raise RecipeError(f"A row has {len(words)} words and {len(tags)} tags: {' '.join(map(str, words))!r}.")
            if wrong := [word for word in words if not isinstance(word, str)]:
                raise RecipeError(f"Column {column!r} must hold lists of words; one of them is {wrong[0]!r}.")
        found: dict[str, list[Any]] = {"starts": [], "cut": [], "length": [], **({"labels": []} if has_tags else {})}
        if not pairs:
            return {"input_ids": [], "attention_mask": [], **found}
        options = {"is_split_into_words": True, "truncation": True, "max_length": max_length}
        encoded = tokenizer([words for words, _ in pairs], **options)
        for i, (words, tags) in enumerate(pairs):
            of_word = encoded.word_ids(i)
            starts = [token for token, word in enumerate(of_word) if word is not None and is_first(of_word, token)]
            found["starts"].append(starts)
            found["cut"].append(len(words) - len(starts))
            found["length"].append(len(of_word))
            if has_tags:
                outputs, row = labels.encode(tags), [IGNORED] * len(of_word)
                for token, word in enumerate(of_word):
                    if word is not None and (label_all_tokens or is_first(of_word, token)):
                        row[token] = outputs[word] if is_first(of_word, token) else inside[outputs[word]]
                found["labels"].append(row)
        return {**encoded, **found}

    return tokenize


def is_first(of_word: Sequence[int | None], token: int) -> bool:
    """Whether a token is the first one of its word."""
    return token == 0 or of_word[token] != of_word[token - 1]


def inside_of(names: Sequence[str]) -> list[int]:
    """For every tag the one of further tokens of the same word: I- for B-, else the same."""
    wanted = [re.sub("^B-", "I-", name) for name in names]
    return [names.index(name) if name in names else i for i, name in enumerate(wanted)]


def tell_cut_words(data: Mapping[str, Data], max_length: int) -> dict[str, Data]:
    """Say how many rows there are and how many words `--max_length` cuts off, which nobody trains or scores."""
    for split, rows in data.items():
        if next(iter(rows), None) is None:
            raise RecipeError(f"The {split} data has no row with words.")
        if is_stream(rows):
            continue
        cut, where = sum(rows["cut"]), sum(number > 0 for number in rows["cut"])
        level = logging.WARNING if cut and split != "train" else logging.INFO
        logger.log(
            level, "%s: %d rows; of %d of them %d words are beyond %d tokens", split, len(rows), where, cut, max_length
        )
    return {split: rows.remove_columns(["cut", "starts"]) for split, rows in data.items()}


# -- metrics ----------------------------------------------------------------------------------------------------------
def choose_metrics(labels: Labels) -> Callable[[list[list[int]], list[list[int]]], dict[str, float]]:
    """From the outputs of the words of each row, right and found, to metrics.

    Tags of entities (O, B-..., I-...) get precision, recall and F1 of whole entities (seqeval), others accuracy and F1
    of tags.
    """
    names = labels.names
    if all(re.fullmatch("O|[BIESLU]-.+", name) for name in names):
        if importlib.util.find_spec("seqeval") is None:
            raise RecipeError("The tags are those of entities, which seqeval scores: pip install seqeval.")
        return lambda true, found: entity_metrics(*(named(rows, names) for rows in (true, found)))
    metric = LocalMetrics(CLASSIFICATION, len(names))
    return lambda true, found: metric.compute(predictions=sum(found, []), references=sum(true, []))


def named(rows: list[list[int]], names: Sequence[str]) -> list[list[str]]:
    return [[names[output] for output in row] for row in rows]


def entity_metrics(true: list[list[str]], found: list[list[str]]) -> dict[str, float]:
    """Of whole entities, as the CoNLL shared task counts them; the accuracy is that of tags."""
    from seqeval import metrics

    names = ("precision", "recall", "f1")
    values = {name: getattr(metrics, f"{name}_score")(true, found, zero_division=0) for name in names}
    return {name: float(value) for name, value in {**values, "accuracy": metrics.accuracy_score(true, found)}.items()}


def score(prediction: EvalPrediction, metrics: Callable[..., dict[str, float]]) -> Scores:
    """The metrics; row by row the share of the tags that are right."""
    found, true = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    counts = true != IGNORED
    rows = [(list(t[c]), list(f[c])) for t, f, c in zip(true, found, counts, strict=True)]
    values = metrics([t for t, _ in rows], [f for _, f in rows])
    return Scores(values, ((found == true) & counts).sum(-1) / counts.sum(-1))


def main(
    argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe; arguments and result of `fine_tune`."""
    flags = read_flags(ARGUMENTS, argv, __doc__, quiet)
    return fine_tune(Path(__file__).stem, flags, prepare(flags), callbacks, quiet)


if __name__ == "__main__":
    run(main)
