"""ListOps expressions: as specified, with the right values, and the same for the same seed."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from lra.listops import WORDS, ListOps
from parts.common import RecipeError


def rows(number: int, seed: int = 0, **settings: float) -> list[tuple[str, int]]:
    return list(islice(ListOps(**settings).rows(seed), number))


def value_of(source: str) -> int:
    """A second evaluator: rewrite innermost lists until one digit is left."""

    def value(found: re.Match[str]) -> str:
        numbers = sorted(map(int, found[2].split()))
        middle = numbers[(len(numbers) - 1) // 2 : len(numbers) // 2 + 1]
        values = {"MIN": numbers[0], "MAX": numbers[-1], "MED": sum(middle) // len(middle), "SM": sum(numbers) % 10}
        return str(values[found[1]])

    while "[" in source:
        source = re.sub(r"\[(MIN|MAX|MED|SM)((?: \d)+) \]", value, source)
    return int(source)


def test_values_of_a_second_evaluator() -> None:
    assert value_of("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9
    assert value_of("[SM [MED 1 2 ] 4 [MED 3 5 8 ] 7 ]") == 7
    for source, target in rows(40):
        assert value_of(source) == target


def test_expressions_are_as_specified() -> None:
    for source, _ in rows(40):
        words = source.split()
        assert set(words) <= set(WORDS)
        assert 500 < len(words) < 2000
        arguments, deepest = [], 0
        for word in words:
            if word == "]":
                assert 2 <= arguments.pop() <= 10
            else:
                if arguments:
                    arguments[-1] += 1
                if word.startswith("["):
                    arguments.append(0)
            deepest = max(deepest, len(arguments))
        assert not arguments
        assert deepest <= 9


def test_operators_and_digits_are_as_frequent_as_specified() -> None:
    words = [word for source, _ in rows(150) for word in source.split()]
    inner = [word for word in words if word != "]"]
    # Long expressions are chosen, so that a little more than a quarter of the arguments are lists.
    assert sum(word.startswith("[") for word in inner) / len(inner) == pytest.approx(0.17, abs=0.02)
    for operator in ("[MIN", "[MAX", "[MED", "[SM"):
        assert words.count(operator) / words.count("]") == pytest.approx(0.25, abs=0.02)


def test_rows_follow_from_the_seed() -> None:
    short = {"min_length": 10, "max_length": 40}
    assert rows(20, 3, **short) == rows(30, 3, **short)[:20]
    assert not set(rows(20, 3, **short)) & set(rows(20, 4, **short))


def test_no_expression_occurs_twice() -> None:
    found = rows(300, min_length=3, max_length=5, max_depth=2, max_arguments=2)
    assert len({source for source, _ in found}) == 300
    with pytest.raises(RecipeError, match="besides the 400 before"):
        rows(401, min_length=3, max_length=5, max_depth=2, max_arguments=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_depth": 1}, "max_depth and max_arguments must be at least 2; got 1 and 10"),
        ({"digit_probability": 1.0}, "digit_probability must be at least 0 and below 1; got 1.0"),
        ({"min_length": 5, "max_length": 6}, "gave no expression"),
    ],
)
def test_settings_without_expressions_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rows(1, **settings)
