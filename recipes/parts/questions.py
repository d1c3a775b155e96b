"""Questions on texts whose answers are spans of them: reading SQuAD's formats, and cutting long contexts into rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase, TrainingArguments

from hf_linattn.data.files import column_names, find_column

from .common import RecipeError, load_splits, refuse_idle_flags
from .data import SPLITS, Data, DataArguments, read_splits
from .text import LengthArguments

CONTEXT_NAMES, QUESTION_NAMES, ANSWER_NAMES = ("context", "document", "text"), ("question", "query"), ("answers",)
# What a row of SQuAD's own JSON holds: articles, or the whole file in one row.
NESTED = ("paragraphs", "data")


@dataclass
class QuestionArguments(LengthArguments, DataArguments):
    """Which questions, and how contexts are cut."""

    context_column: str | None = field(
        default=None, metadata={"help": f"Default: the first of {', '.join(CONTEXT_NAMES)}"}
    )
    question_column: str | None = field(
        default=None, metadata={"help": f"Default: the first of {', '.join(QUESTION_NAMES)}"}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of {'text': [...], 'answer_start': [...]} (default: answers)"}
    )
    doc_stride: int = field(
        default=128, metadata={"help": "Tokens that two rows share where a context is cut into several"}
    )
    no_stride: bool = field(
        default=False,
        metadata={
            "help": "Read every context whole, in one row; longer ones than the model's need --extend_positions"
        },
    )
    version_2_with_negative: bool = field(default=False, metadata={"help": "Some questions have no answer (SQuAD 2)"})
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "No answer is given if its score is above the best answer's by more than this"}
    )
    n_best_size: int = field(default=20, metadata={"help": "Starts and ends that are tried for an answer"})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of the longest answer that is given"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("doc_stride", "n_best_size", "max_answer_length"):
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name} must be at least 1; got {getattr(self, name)}.")
        if self.no_stride and self.doc_stride != QuestionArguments.doc_stride:
            raise RecipeError(f"--doc_stride {self.doc_stride} does nothing with --no_stride. Give one of them.")
        refuse_idle_flags(self, {"version_2_with_negative": ["null_score_diff_threshold"]})


@dataclass(frozen=True)
class Example:
    """A question and its context.

    Args:
        answers: (text, index of its first character in the context) each; empty where there is none.
    """

    context: str
    question: str
    answers: Sequence[tuple[str, int]] = ()


@dataclass
class QuestionColumns:
    context: str
    question: str
    answers: str

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """A row, checked. Raises: RecipeError that begins with `where`."""
        context, question = row[self.context], row[self.question]
        for name, value in ((self.context, context), (self.question, question)):
            if not isinstance(value, str):
                raise RecipeError(f"{where}: column {name!r} must hold text; got {value!r}.")
        answers = _answers(row.get(self.answers), f"{where}: column {self.answers!r}")
        for text, start in answers:
            if context[start : start + len(text)] != text or start < 0:
                found = context[max(start, 0) : max(start, 0) + len(text)]
                raise RecipeError(
                    f"{where}: the context must hold the answer {text!r} at character {start} (answer_start); it has "
                    f"{found!r} there."
                )
        return Example(context, question.strip(), answers)


def _answers(value: Any, where: str) -> list[tuple[str, int]]:
    """Answers of a row: lists of texts and starts, or a list of both together."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
    else:
        texts, starts = [each.get("text") for each in value], [each.get("answer_start") for each in value]
    is_paired = isinstance(texts, Sequence) and isinstance(starts, Sequence) and len(texts) == len(starts)
    if not is_paired or not all(isinstance(t, str) and isinstance(s, int) for t, s in zip(texts, starts, strict=True)):
        raise RecipeError(f"{where} must hold texts and as many answer_start (whole numbers); got {value!r}.")
    return list(zip(texts, starts, strict=True))


# -- reading ----------------------------------------------------------------------------------------------------------
def read_questions(args: QuestionArguments, training: TrainingArguments) -> tuple[dict[str, Data], QuestionColumns]:
    """The splits that the run needs, a row a question."""
    files = {split: getattr(args, f"{split}_file") for split in SPLITS}
    given: dict[str, Data] | None = None
    if any(_is_nested(path) for path in files.values()):
        with training.main_process_first(desc="reading the questions"):
            given = {
                split: _flat(path) if _is_nested(path) else load_splits({split: path})[split]
                for split, path in files.items()
                if path
            }
    splits = read_splits(args, training, given=given)
    names = column_names(next(iter(splits.values())))
    columns = QuestionColumns(
        find_column(names, args.context_column, CONTEXT_NAMES, "context_column"),
        find_column(names, args.question_column, QUESTION_NAMES, "question_column"),
        find_column(names, args.answer_column, ANSWER_NAMES, "answer_column"),
    )
    for split, data in splits.items():
        for name in (columns.context, columns.question, columns.answers):
            if name not in column_names(data) and (name, split) != (columns.answers, "test"):
                raise RecipeError(f"The {split} data has no column {name!r}; its columns: {column_names(data)}.")
    return splits, columns


def _is_nested(path: str | None) -> bool:
    """Whether a file has the layout in which SQuAD is distributed: articles of paragraphs of questions."""
    if path is None or Path(path).suffix.lower() not in (".json", ".jsonl") or not Path(path).is_file():
        return False
    with open(path, encoding="utf-8") as file:
        start = file.read(4096).lstrip()
    return start.startswith("{") and any(f'"{name}"' in start for name in NESTED)


def _flat(path: str) -> datasets.Dataset:
    """The questions of such a file, a row each."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        try:
            articles = json.loads(text)["data"]
        except json.JSONDecodeError:  # an article a line
            articles = [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = [
            {"id": str(each.get("id", number)), "context": paragraph["context"], "question": each["question"]}
            | {"answers": _as_lists(each.get("answers") or [])}
            for article in articles
            for paragraph in article["paragraphs"]
            for number, each in enumerate(paragraph["qas"])
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path!r} must hold SQuAD's JSON: data, paragraphs, context, qas, question; found {error!r}."
        ) from error
    return datasets.Dataset.from_list(rows)


def _as_lists(answers: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}


# -- rows of the model ------------------------------------------------------------------------------------------------
@dataclass
class Encoder:
    """From questions to inputs of the model, several where a context is cut.

    Args:
        split: For messages.
        keeps_places: Also return what finding the answer's text needs: of each row its question (`example`), the row
            of the logits that means "no answer" (`null`), and the characters of each token (`offsets`; (0, 0) outside
            of the context).
    """

    tokenizer: PreTrainedTokenizerBase
    columns: QuestionColumns
    args: QuestionArguments
    max_length: int
    split: str
    keeps_places: bool

    def __call__(self, rows: dict[str, list[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        names = list(rows)
        every = [dict(zip(names, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        where = [f"Row {number} of the {self.split} data" for number in numbers]
        examples = [self.columns.example(row, place) for row, place in zip(every, where, strict=True)]
        has_answers = self.columns.answers in rows
        if has_answers and not self.args.version_2_with_negative:
            for example, place in zip(examples, where, strict=True):
                if not example.answers:
                    raise RecipeError(f"{place} has no answer. If that is right: --version_2_with_negative.")
        encoded = self._tokenize(examples, where)
        found: dict[str, list[Any]] = {
            name: encoded[name] for name in self.tokenizer.model_input_names if name in encoded
        }
        found["length"] = [len(ids) for ids in encoded["input_ids"]]
        owners = encoded.get("overflow_to_sample_mapping", range(len(examples)))
        offsets = [self._context_offsets(encoded, row) for row in range(len(found["length"]))]
        nulls = [self._null_place(ids) for ids in encoded["input_ids"]]
        if has_answers:
            spans = [
                _token_span(places, examples[owner].answers, null)
                for places, owner, null in zip(offsets, owners, nulls, strict=True)
            ]
            found["start_positions"], found["end_positions"] = [s for s, _ in spans], [e for _, e in spans]
        if self.keeps_places:
            found |= {"example": [numbers[owner] for owner in owners], "null": nulls, "offsets": offsets}
        return found

    def _tokenize(self, examples: Sequence[Example], where: Sequence[str]) -> Any:
        questions, contexts = [each.question for each in examples], [each.context for each in examples]
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        if self.args.no_stride:
            encoded = self.tokenizer(questions, contexts, return_offsets_mapping=True, verbose=False)
            for ids, place in zip(encoded["input_ids"], where, strict=True):
                if len(ids) > self.max_length:
                    raise RecipeError(
                        f"{place} has {len(ids)} tokens, and --no_stride reads them in one row of at most "
                        f"{self.max_length}. Give --extend_positions {len(ids)} or more, or leave --no_stride out."
                    )
            return encoded
        for ids, place in zip(self.tokenizer(questions, add_special_tokens=False)["input_ids"], where, strict=True):
            room = self.max_length - special - len(ids)
            if room <= self.args.doc_stride:
                raise RecipeError(
                    f"{place}: beside a question of {len(ids)} tokens, rows of {self.max_length} have room for {room} "
                    f"of the context, which must be more than --doc_stride {self.args.doc_stride}."
                )
        return self.tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.args.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def _context_offsets(self, encoded: Any, row: int) -> list[tuple[int, int]]:
        parts = encoded.sequence_ids(row)
        return [
            tuple(place) if part == 1 else (0, 0)
            for place, part in zip(encoded["offset_mapping"][row], parts, strict=True)
        ]

    def _null_place(self, ids: Sequence[int]) -> int:
        """Where a row says that it holds no answer: at its [CLS], else at its first token."""
        cls = self.tokenizer.cls_token_id
        return ids.index(cls) if cls in ids else 0


def _token_span(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[str, int]], null: int) -> tuple[int, int]:
    """First and last token of the first answer; those of "no answer" where the row does not hold all of it."""
    if not answers:
        return null, null
    text, start = answers[0]
    end = start + len(text)
    inside = [i for i, (first, last) in enumerate(offsets) if last > first]
    tokens = [i for i in inside if offsets[i][0] < end and offsets[i][1] > start]
    if not tokens or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return null, null
    return tokens[0], tokens[-1]
