"""Relative positions inside a window, as indices into a table of learned biases: `window_bias = table[index]`.

A window has `window_size` queries and `left + window_size + right` slots for keys (`eva_attention`, `window_bias`). On
a grid it is a square of queries in a square of slots, both flattened row by row. Every function returns indices
`[queries, slots]`; `convention="published"` is the index of the official code (`HKUNLP/efficient-attention`), for
tables that were trained with it.

| | "corrected" | "published" |
|---|---|---|
| table, sequence | one entry per offset | one entry per pair (place of the query, slot) |
| table, grid | one entry per pair of offsets | rows too short by a few entries: some offsets share one |
| T5, sequence | bucket of (key - query) | bucket of (slot - place), off by `left` |
| T5, grid | one bucket per axis | bucket of the difference of the two flattened indices |
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ..tracing import outside_tracing

CONVENTIONS = ("corrected", "published")


def _check(window_size: int, left: int, right: int, convention: str) -> None:
    if window_size < 1 or left < 0 or right < 0:
        raise InputError(
            f"window_size must be >= 1 and left, right >= 0; got {window_size!r}, {left!r} and {right!r}."
        )
    if convention not in CONVENTIONS:
        raise InputError(f"convention must be one of {list(CONVENTIONS)}; got {convention!r}.")


def _pairs(queries: int, slots: int, is_grid: bool) -> list[tuple[Tensor, Tensor]]:
    """Places of query `[queries, 1]` and slot `[1, slots]`, one pair per dimension."""
    a, j = torch.arange(queries), torch.arange(slots)
    if not is_grid:
        return [(a[:, None], j[None])]
    a, j = torch.arange(queries**2)[:, None], torch.arange(slots**2)[None]
    return [(a // queries, j // slots), (a % queries, j % slots)]


def table_size(
    window_size: int, left: int = 0, right: int = 0, *, is_grid: bool = False, convention: str = "corrected"
) -> int:
    """Entries that `table_index` points into."""
    _check(window_size, left, right, convention)
    offsets, slots = left + 2 * window_size - 1 + right, left + window_size + right
    if convention == "corrected":
        return offsets**2 if is_grid else offsets
    return (offsets - 1) * (slots + 1) + 1 if is_grid else window_size * slots


def table_index(
    window_size: int, left: int = 0, right: int = 0, *, is_grid: bool = False, convention: str = "corrected"
) -> Tensor:
    """Index into a table with one bias per relative position.

    Source: Zheng et al. 2023, arXiv:2302.04542 (as in Liu et al. 2021, arXiv:2103.14030, on a grid). Differs from it:
        "published" on a grid, `(a1 - j1 + c) * slots + (a2 - j2 + c)`, gives some offsets the same entry because there
        are more column offsets than slots; "corrected" does not.

    Args:
        window_size: Queries of a window, or the side of the square.
        left, right: Slots before and after it, in every dimension.
        is_grid: Windows of a grid.
        convention: "corrected" or "published".
    Returns: int64 `[queries, slots]`, values below `table_size(...)`.
    Raises: InputError for sizes that cannot be.
    Cost: O(queries * slots). Random: no.
    """
    _check(window_size, left, right, convention)
    slots = left + window_size + right
    pairs = _pairs(window_size, slots, is_grid)
    if convention == "published" and not is_grid:
        place, slot = pairs[0]
        return place * slots + slot
    stride = slots if convention == "published" else left + 2 * window_size - 1 + right
    index = torch.zeros(1, dtype=torch.long)
    for place, slot in pairs:
        index = index * stride + (place - slot + slots - 1)
    return index


def t5_bucket(distance: Tensor, num_buckets: int, max_distance: int, *, is_causal: bool = False) -> Tensor:
    """Bucket of a relative position: one each for short distances, logarithmically wider ones up to `max_distance`.

    Source: Raffel et al. 2020, arXiv:1910.10683. Differs from it: where `max_distance` is not larger than the range of
        exact buckets, all distances beyond that range share the last bucket (the formula divides by `log(1)`).

    Args:
        distance: Integers, key minus query.
        num_buckets: At least 2; in the bidirectional form half of them are for keys after the query (at least 4).
        max_distance: From here on everything shares one bucket.
        is_causal: Later keys are not told apart (they are never seen).
    Returns: int64 of the shape of `distance`, values in `0 .. num_buckets - 1`.
    Raises: InputError for sizes that cannot be.
    Cost: O(1) per element. Random: no.
    """
    least = 2 if is_causal else 4
    if num_buckets < least or max_distance < 1:
        raise InputError(
            f"num_buckets must be >= {least} and max_distance >= 1; got {num_buckets!r} and {max_distance!r}."
        )
    buckets = num_buckets if is_causal else num_buckets // 2
    exact = buckets // 2
    far = (-distance).clamp_min(0) if is_causal else distance.abs()
    last = torch.full_like(far, buckets - 1)
    if max_distance > exact:
        # In float32 and in this order, as wherever such tables have been trained: the borders depend on rounding.
        scale = torch.log(far.clamp_min(exact).float() / exact) / math.log(max_distance / exact)
        last = torch.minimum(last, exact + (scale * (buckets - exact)).long())
    bucket = torch.where(far < exact, far, last)
    return bucket if is_causal else bucket + (distance > 0).long() * buckets


def t5_sizes(window_size: int, reach: int = 0) -> tuple[int, int]:
    """(num_buckets, max_distance) that the official EVA code takes for a window and its reach (side of a square)."""
    return max(min((window_size + reach) // 2, 64), 16), window_size + reach


def t5_index(
    window_size: int,
    left: int = 0,
    right: int = 0,
    *,
    num_buckets: int,
    max_distance: int,
    is_causal: bool = False,
    is_grid: bool = False,
    convention: str = "corrected",
) -> Tensor:
    """Index into a table with one bias per T5 bucket: `num_buckets` entries, "corrected" on a grid `num_buckets ** 2`.

    Source: Raffel et al. 2020, arXiv:1910.10683 (buckets); Zheng et al. 2023, arXiv:2302.04542 (their use in windows).
        Differs from it: "corrected" measures distances between tokens, not between indices: the official code
        forgets the slots before the window and, on a grid, the two dimensions.

    Args: As in `table_index` and `t5_bucket`.
    Returns: int64 `[queries, slots]`.
    Raises: InputError for sizes that cannot be.
    Cost: O(queries * slots). Random: no.
    """
    _check(window_size, left, right, convention)
    slots = left + window_size + right
    published = convention == "published"
    if published and is_grid:
        window_size, slots, is_grid = window_size**2, slots**2, False
    index = torch.zeros(1, dtype=torch.long)
    for place, slot in _pairs(window_size, slots, is_grid):
        distance = slot - place - (0 if published else left)
        index = index * num_buckets + t5_bucket(distance, num_buckets, max_distance, is_causal=is_causal)
    return index


@torch.compiler.assume_constant_result
def constant_index(kind: str, window_size: int, left: int, right: int, device: str, **options: Any) -> Tensor:
    """`table_index` ("table") or `t5_index` ("t5") on a device, computed once; a constant to `torch.compile`."""
    return _constant_index(kind, window_size, left, right, device, **options)


@functools.lru_cache(maxsize=64)
def _constant_index(kind: str, window_size: int, left: int, right: int, device: str, **options: Any) -> Tensor:
    make = table_index if kind == "table" else t5_index
    with outside_tracing():
        return make(window_size, left, right, **options).to(device)
