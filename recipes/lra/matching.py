"""Document matching without the citation network of Long Range Arena: do two passages come from the same source?

Sources are texts of different kinds, such as reviews, encyclopedia articles and plays. Each is cut into passages of
about one length; a pair is two different passages of one source (label 1) or of two (label 0).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from parts.common import RecipeError


def passages(text: str, length: int) -> list[str]:
    """Consecutive parts of a text, each as many whole words as fit into `length` bytes; the rest is dropped."""
    parts: list[str] = []
    words: list[str] = []
    size = 0
    for word in text.split():
        more = len(word.encode()) + (1 if words else 0)
        if words and size + more > length:
            parts.append(" ".join(words))
            words, size, more = [], 0, len(word.encode())
        words.append(word)
        size += more
    return parts


def pairs(sources: Mapping[str, Sequence[str]], seed: int) -> Iterator[tuple[str, str, int]]:
    """Two passages and a label, without end. Rows 2 k and 2 k + 1 have both labels, in random order.

    Args:
        sources: Name of a source -> its passages.
    Raises: RecipeError if there are fewer than two sources, or one with fewer than two different passages.
    """
    if len(sources) < 2:
        raise RecipeError(f"Matching needs at least two sources; got {list(sources)}.")
    choices = {name: sorted(set(parts)) for name, parts in sources.items()}
    for name, parts in choices.items():
        if len(parts) < 2:
            raise RecipeError(f"Source {name!r} has {len(parts)} different passages; at least 2 are needed.")
    return _draw(list(choices.values()), random.Random(f"matching {seed}"))


def _draw(sources: Sequence[Sequence[str]], rng: random.Random) -> Iterator[tuple[str, str, int]]:
    while True:
        for label in rng.sample((0, 1), 2):
            if label:
                first, second = rng.sample(rng.choice(sources), 2)
            else:
                first, second = (rng.choice(source) for source in rng.sample(sources, 2))
            yield first, second, label
