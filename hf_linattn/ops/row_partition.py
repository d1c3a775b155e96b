"""Where rows that are ordered by length are cut into groups."""

from __future__ import annotations

# Lengths between which borders of groups are looked for, at most.
_CANDIDATES = 48


def parts(ordered: list[int], exact_length: int) -> list[tuple[int, int, bool]]:
    """Rows that are longer than `exact_length`, and the others, without those that have no token."""
    longer = sum(length > exact_length for length in ordered)
    full = sum(length > 0 for length in ordered)
    return [part for part in ((0, min(longer, full), False), (longer, full, True)) if part[0] < part[1]]


def partition(ordered: list[int], cost: int) -> list[tuple[int, int]]:
    """Where to cut rows of falling lengths so that padded tokens and `cost` of a group are least, as `(first, last)`.

    Cuts are looked for where the length changes, at `_CANDIDATES` places at most: O(_CANDIDATES ** 2).
    """
    borders = [0, *(n for n in range(1, len(ordered)) if ordered[n] != ordered[n - 1]), len(ordered)]
    if len(borders) > _CANDIDATES:
        step = (len(borders) - 1) / (_CANDIDATES - 1)
        borders = [borders[round(n * step)] for n in range(_CANDIDATES)]
    best: list[tuple[int, int]] = [
        (0, 0)
    ]  # of the rows before a border: what they cost, where their last group starts
    for end in range(1, len(borders)):
        tried = (
            (best[start][0] + cost + (borders[end] - borders[start]) * ordered[borders[start]], start)
            for start in range(end)
        )
        best.append(min(tried))
    cuts, end = [], len(borders) - 1
    while end:
        start = best[end][1]
        cuts.append((borders[start], borders[end]))
        end = start
    return cuts[::-1]
