"""Pairs of passages: balanced, of the sources that the label says, the same for the same seed."""

from __future__ import annotations

from itertools import islice

import pytest

from lra.matching import pairs, passages
from parts.common import RecipeError

SOURCES = {name: [f"{name} {i}" for i in range(9)] for name in ("plays", "reviews", "articles")}


def test_passages_fill_their_length_with_whole_words() -> None:
    text = "eins zwei drei\nvier fünf " * 20
    parts = passages(text, 30)
    assert " ".join(parts).split() == text.split()[: len(" ".join(parts).split())]
    sizes = [len(part.encode()) for part in parts]
    assert max(sizes) <= 30
    assert min(sizes) > 24
    assert passages("a" * 50 + " b", 10) == ["a" * 50]


def test_labels_say_whether_the_source_is_the_same() -> None:
    rows = list(islice(pairs(SOURCES, 0), 200))
    for first, second, label in rows:
        assert label == (first.split()[0] == second.split()[0])
        assert first != second
    labels = [label for _, _, label in rows]
    assert all(set(pair) == {0, 1} for pair in zip(labels[::2], labels[1::2], strict=True))
    assert {first for first, _, _ in rows} == {part for parts in SOURCES.values() for part in parts}


def test_pairs_follow_from_the_seed() -> None:
    rows = list(islice(pairs(SOURCES, 5), 20))
    assert rows == list(islice(pairs(SOURCES, 5), 30))[:20]
    assert rows != list(islice(pairs(SOURCES, 6), 20))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"plays": ["a", "b"]}, "at least two sources; got"),
        ({"plays": ["a", "a"], "reviews": ["b", "c"]}, "'plays' has 1 different passages"),
    ],
)
def test_too_few_texts_are_refused(sources: dict[str, list[str]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pairs(sources, 0)
