"""From scores of starts and ends to answers, and how good those are: exact match and F1, as SQuAD counts them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .questions import Example, QuestionArguments

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


# -- answers ----------------------------------------------------------------------------------------------------------
def best_answers(
    examples: Sequence[Example], rows: Any, logits: tuple[np.ndarray, np.ndarray], args: QuestionArguments
) -> list[str]:
    """The best answer to every question, "" for none.

    Args:
        rows: Of the model: columns `example`, `null`, `offsets`.
        logits: Of starts and of ends, `[rows, tokens]`.
    """
    best = [(-np.inf, "") for _ in examples]
    null = np.full(len(examples), np.inf)
    places = zip(rows["example"], rows["null"], rows["offsets"], strict=True)
    for (example, cls, offsets), starts, ends in zip(places, *logits, strict=True):
        null[example] = min(null[example], starts[cls] + ends[cls])
        score, first, last = _best_span(starts, ends, np.asarray(offsets), args)
        if score > best[example][0]:
            best[example] = score, examples[example].context[first:last]
    if not args.version_2_with_negative:
        return [text for _, text in best]
    gives_none = null - [score for score, _ in best] > args.null_score_diff_threshold
    return ["" if none else text for none, (_, text) in zip(gives_none, best, strict=True)]


def _best_span(
    starts: np.ndarray, ends: np.ndarray, offsets: np.ndarray, args: QuestionArguments
) -> tuple[float, int, int]:
    """Score of the best span of a row, and its characters; -inf if there is none."""
    inside = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    firsts, lasts = (
        inside[np.argsort(-scores[inside], kind="stable")[: args.n_best_size]] for scores in (starts, ends)
    )
    lengths = lasts[None, :] - firsts[:, None] + 1
    scores = np.where(
        (lengths >= 1) & (lengths <= args.max_answer_length), starts[firsts][:, None] + ends[lasts][None, :], -np.inf
    )
    if not scores.size or np.isneginf(scores.max()):
        return -np.inf, 0, 0
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), int(offsets[firsts[first], 0]), int(offsets[lasts[last], 1])


# -- scores -----------------------------------------------------------------------------------------------------------
def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces.

    Source: the evaluation script of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, true: str) -> float:
    return float(normalized(answer) == normalized(true))


def f1(answer: str, true: str) -> float:
    """Of the words that both have; 1 if both are empty."""
    found, expected = normalized(answer).split(), normalized(true).split()
    if not found or not expected:
        return float(found == expected)
    shared = sum((Counter(found) & Counter(expected)).values())
    return 2 * shared / (len(found) + len(expected))


def score_answers(answers: Sequence[str], examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of every question `[questions]`, beside the true answer that fits best."""
    scores = [
        [max(metric(answer, true) for true in _true(example)) for metric in (exact_match, f1)]
        for answer, example in zip(answers, examples, strict=True)
    ]
    exact, overlap = np.asarray(scores, dtype=float).reshape(-1, 2).T
    return exact, overlap


def _true(example: Example) -> list[str]:
    """The answers that leave something after normalisation; "" if there are none."""
    return [text for text, _ in example.answers if normalized(text)] or [""]
