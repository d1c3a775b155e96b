"""Answers out of the scores of their first and last tokens, and how they compare with the true ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import question_answering
from parts.questions import Example, QuestionArguments
from parts.spans import best_answers, exact_match, f1, score_answers


# -- answers ----------------------------------------------------------------------------------------------------------
def rows_of(*rows: tuple[int, int, list[tuple[int, int]]]) -> dict[str, list[Any]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(("example", "null", "offsets"))}


def logits_of(*rows: list[float]) -> np.ndarray:
    return np.asarray(rows, dtype=np.float32)


TEXT = Example("one two three", "?")
OFFSETS = [(0, 0), (0, 0), (0, 3), (4, 7), (8, 13)]  # [CLS], the question, the context


def test_the_best_span_of_all_rows_is_the_answer() -> None:
    rows = rows_of((0, 0, OFFSETS), (0, 0, OFFSETS))
    starts = logits_of([9, 9, 1, 2, 0], [0, 0, 3, 0, 0])
    ends = logits_of([9, 9, 4, 1, 2], [0, 0, 0, 0, 3])
    args = QuestionArguments()
    assert best_answers([TEXT], rows, (starts, ends), args) == ["one two three"]  # 3 + 3, neither the 9s nor 1 + 4
    assert best_answers([TEXT], rows, (starts, ends), QuestionArguments(max_answer_length=2)) == ["one"]
    # An end before its start is no span, and only so many of each are tried.
    backwards = logits_of([0, 0, 0, 0, 5]), logits_of([0, 0, 5, 0, 1])
    assert best_answers([TEXT], rows_of((0, 0, OFFSETS)), backwards, args) == ["three"]
    assert best_answers([TEXT], rows_of((0, 0, OFFSETS)), backwards, QuestionArguments(n_best_size=1)) == [""]


def test_no_answer_where_its_score_is_higher() -> None:
    rows = rows_of((0, 0, OFFSETS), (0, 0, OFFSETS))
    starts = logits_of([4, 0, 3, 0, 0], [1, 0, 0, 0, 0])
    ends = logits_of([4, 0, 3, 0, 0], [1, 0, 0, 0, 0])

    def answer(**options: Any) -> str:
        return best_answers([TEXT], rows, (starts, ends), QuestionArguments(**options))[0]

    assert answer() == "one"
    # The row least sure that there is none decides: 1 + 1 against 3 + 3.
    assert answer(version_2_with_negative=True) == "one"
    assert answer(version_2_with_negative=True, null_score_diff_threshold=-4.5) == ""
    assert answer(version_2_with_negative=True, null_score_diff_threshold=-3.5) == "one"


@given(st.integers(0, 2**32 - 1))
def test_the_best_span_is_that_of_all_pairs(seed: int) -> None:
    draw = np.random.default_rng(seed)
    starts, ends = draw.normal(size=(2, 1, 5))
    args = QuestionArguments(max_answer_length=int(draw.integers(1, 4)))
    pairs = [(i, j) for i in range(2, 5) for j in range(i, min(5, i + args.max_answer_length))]
    i, j = max(pairs, key=lambda pair: starts[0, pair[0]] + ends[0, pair[1]])
    expected = TEXT.context[OFFSETS[i][0] : OFFSETS[j][1]]
    assert best_answers([TEXT], rows_of((0, 0, OFFSETS)), (starts, ends), args) == [expected]


# -- scores -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "true", "exact", "overlap"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0, 1.0),
        ("in Paris", "Paris", 0.0, 2 / 3),
        ("a b b", "b b c", 0.0, 4 / 5),  # "a" is an article
        ("London", "Paris", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("", "Paris", 0.0, 0.0),
        ("theory", "the ory", 0.0, 0.0),
    ],
)
def test_answers_are_compared_as_in_squad(answer: str, true: str, exact: float, overlap: float) -> None:
    assert exact_match(answer, true) == exact
    assert f1(answer, true) == pytest.approx(overlap)


def test_the_true_answer_that_fits_best_counts() -> None:
    examples = [Example("", "", [("one", 0), ("one two", 0)]), Example("", "", [])]
    exact, overlap = score_answers(["one two", "one"], examples)
    assert exact.tolist() == [1.0, 0.0]
    assert overlap.tolist() == [1.0, 0.0]
    found = question_answering.score(["one two", ""], examples)
    assert found.metrics == {"exact_match": 1.0, "f1": 1.0, "no_answer_f1": 1.0, "has_answer_f1": 1.0}
    assert found.rows.tolist() == [1.0, 1.0]
