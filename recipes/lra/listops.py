"""ListOps: nested operations on lists of digits, such as `[MAX 2 9 [MIN 4 7 ] 0 ]`, whose value is the label.

Follows the specification of Long Range Arena (Tay et al. 2021, arXiv:2011.04006; Nangia and Bowman 2018): operators
MIN, MAX, MED (median, rounded down) and SM (sum modulo 10) of 2 to 10 arguments, of which each is a digit with
probability 3/4, ten levels deep at most, more than 500 and fewer than 2,000 words. Written without the round
parentheses that the published files have and that its input pipeline takes out.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from parts.common import RecipeError

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
CLOSE = "]"
DIGITS = tuple("0123456789")
WORDS = (*OPERATORS, CLOSE, *DIGITS)
MOST_DRAWS = 100_000  # of the published settings one in twelve is accepted


@dataclass(frozen=True)
class ListOps:
    """Which expressions are drawn.

    Args:
        min_length, max_length: In words; an expression has more than the first and fewer than the second.
        max_depth: Levels, the digits of the innermost list included.
        max_arguments: Of an operator.
        digit_probability: That an argument is a digit and not a list.
    """

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_arguments: int = 10
    digit_probability: float = 0.75

    def __post_init__(self) -> None:
        if self.max_depth < 2 or self.max_arguments < 2:
            raise RecipeError(
                f"max_depth and max_arguments must be at least 2; got {self.max_depth} and {self.max_arguments}."
            )
        if not 0 <= self.digit_probability < 1:
            raise RecipeError(f"digit_probability must be at least 0 and below 1; got {self.digit_probability}.")

    def rows(self, seed: int) -> Iterator[tuple[str, int]]:
        """Expressions and their values, without end and without repetition.

        Row i depends on (seed, i) alone, unless it is so short that an earlier row was the same.
        Raises: RecipeError if there are (almost) no further expressions.
        """
        seen: set[bytes] = set()
        for row in itertools.count():
            rng = random.Random(f"listops {seed} {row}")
            for _ in range(MOST_DRAWS):
                words: list[str] = []
                value = self._argument(rng, 1, words)
                if value is None or not self.min_length < len(words) < self.max_length:
                    continue
                source = " ".join(words)
                digest = hashlib.blake2b(source.encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield source, value
                    break
            else:
                raise RecipeError(
                    f"{MOST_DRAWS:,} draws gave no expression, besides the {row} before, of more than "
                    f"{self.min_length} and fewer than {self.max_length} words with max_depth={self.max_depth}, "
                    f"max_arguments={self.max_arguments}, digit_probability={self.digit_probability}."
                )

    def _argument(self, rng: random.Random, depth: int, words: list[str]) -> int | None:
        """Append the words of a digit or a list and return its value; None as soon as there are too many words."""
        if depth == self.max_depth or rng.random() < self.digit_probability:
            digit = rng.randrange(10)
            words.append(DIGITS[digit])
            return digit
        operator = rng.choice(OPERATORS)
        words.append(operator)
        values = []
        for _ in range(rng.randint(2, self.max_arguments)):
            value = self._argument(rng, depth + 1, words)
            if value is None or len(words) >= self.max_length:
                return None
            values.append(value)
        words.append(CLOSE)
        return apply(operator, values)


def apply(operator: str, values: list[int]) -> int:
    """The value of one list."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[MED":
        return int(statistics.median(values))
    return sum(values) % 10
