"""Build questions on long documents, with answers that are right by construction, out of running text.

A document is a number of sentences in random order. A question gives the first words of one of them, which begin no
other, and its answer is the rest of that sentence: a model has to find the place, wherever it is.

    python recipes/build_questions.py --input wikitext2/validation.parquet --output questions/train.parquet \\
        --documents 4000 --sentences 12

The file has the columns of SQuAD: id, context, question, answers. With `--unanswerable 0.3` that share of the
questions is about sentences that are not in their document (SQuAD 2).
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from build_documents import BuildError

QUESTION = 'What follows "{start}"?'
UNKNOWN = "<unk>"  # what WikiText writes for rare words


def find_sentences(texts: Iterable[str], shortest: int, longest: int) -> list[str]:
    """The distinct sentences of so many words, in the order of the texts, without headings and unknown words."""
    found: dict[str, None] = {}
    for text in texts:
        if text.strip().startswith("="):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
            is_whole = sentence.endswith((".", "!", "?")) and sentence[:1].isupper()
            if is_whole and UNKNOWN not in sentence and shortest <= len(sentence.split()) <= longest:
                found[sentence] = None
    return list(found)


def build_questions(
    sentences: Sequence[str],
    *,
    documents: int,
    sentences_per_document: int = 12,
    question_words: int = 5,
    unanswerable: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of SQuAD's format, one a document; a fixed function of the arguments.

    Args:
        question_words: Words of a sentence in its question. At least two are left for the answer.
        unanswerable: Share of the questions whose sentence is not in the document.
    Raises: BuildError if there are too few sentences, or a share that is none.
    """
    if not 0 <= unanswerable <= 1:
        raise BuildError(f"unanswerable must be a share, from 0 to 1; got {unanswerable}.")
    starts: dict[str, list[str]] = {}
    for sentence in sentences:
        starts.setdefault(" ".join(sentence.split()[:question_words]), []).append(sentence)
    usable = [group[0] for group in starts.values() if len(group) == 1]
    usable = [sentence for sentence in usable if len(_answer(sentence, question_words).split()) >= 2]
    if len(usable) <= sentences_per_document:
        raise BuildError(
            f"The text has {len(usable)} sentences that begin like no other; documents of {sentences_per_document} "
            "need more."
        )
    draw = random.Random(seed)
    rows = []
    for number in range(documents):
        *chosen, other = draw.sample(usable, sentences_per_document + 1)
        asked = other if draw.random() < unanswerable else draw.choice(chosen)
        context = " ".join(chosen)
        answer = _answer(asked, question_words)
        answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
        if asked is not other:
            place = context.index(asked) + asked.index(answer, len(" ".join(asked.split()[:question_words])))
            answers = {"text": [answer], "answer_start": [place]}
        question = QUESTION.format(start=" ".join(asked.split()[:question_words]))
        rows.append({"id": str(number), "context": context, "question": question, "answers": answers})
    return rows


def _answer(sentence: str, question_words: int) -> str:
    """What follows the first words of a sentence, without the mark at its end."""
    return " ".join(sentence.split()[question_words:]).rstrip(".!? ")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="parquet file of texts")
    parser.add_argument("--output", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--documents", type=int, required=True, help="how many documents to build")
    parser.add_argument("--sentences", type=int, default=12, help="sentences in a document (default: %(default)s)")
    parser.add_argument("--question_words", type=int, default=5, help="of the sentence (default: %(default)s)")
    parser.add_argument("--shortest", type=int, default=9, help="words of a sentence, at least (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=20, help="words of a sentence, at most (default: %(default)s)")
    parser.add_argument("--unanswerable", type=float, default=0.0, help="share of questions without an answer")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--text_column", default="text", help="default: %(default)s")
    args = parser.parse_args(argv)

    try:
        table = pq.read_table(args.input)
        if args.text_column not in table.column_names:
            raise BuildError(f"The file has no column {args.text_column!r}; columns: {table.column_names}.")
        rows = build_questions(
            find_sentences(table[args.text_column].to_pylist(), args.shortest, args.longest),
            documents=args.documents,
            sentences_per_document=args.sentences,
            question_words=args.question_words,
            unanswerable=args.unanswerable,
            seed=args.seed,
        )
    except (BuildError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), args.output, compression="zstd")
    words = sum(len(row["context"].split()) for row in rows) / max(1, len(rows))
    print(f"{args.output}: {len(rows)} documents, {words:.0f} words on average")


if __name__ == "__main__":
    main()
