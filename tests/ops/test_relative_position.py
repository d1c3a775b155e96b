"""Relative positions of a window as table indices: against loops over positions, and what each convention shares."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_linattn.errors import InputError
from hf_linattn.ops.eva.relative_position import t5_bucket, t5_index, t5_sizes, table_index, table_size

SIZES = [(1, 0, 0), (4, 0, 0), (5, 2, 2), (4, 4, 0), (2, 1, 1), (3, 3, 3)]


def places(size: int, start: int, is_grid: bool) -> list[tuple[int, ...]]:
    """Coordinates of a window's queries, or of its slots when it starts before them."""
    side = range(start, size)
    return list(itertools.product(side, side)) if is_grid else [(i,) for i in side]


@pytest.mark.parametrize("is_grid", [False, True])
@pytest.mark.parametrize(("window", "left", "right"), SIZES)
def test_one_entry_per_offset(window: int, left: int, right: int, is_grid: bool) -> None:
    index = table_index(window, left, right, is_grid=is_grid)
    entries: dict[tuple[int, ...], int] = {}
    queries, slots = places(window, 0, is_grid), places(window + right, -left, is_grid)
    assert index.shape == (len(queries), len(slots))
    for (i, a), (j, b) in itertools.product(enumerate(queries), enumerate(slots)):
        offset = tuple(q - p for p, q in zip(a, b, strict=True))
        assert entries.setdefault(offset, int(index[i, j])) == index[i, j]
    assert sorted(entries.values()) == list(range(table_size(window, left, right, is_grid=is_grid)))


@pytest.mark.parametrize(("window", "left", "right"), SIZES)
def test_published_tables(window: int, left: int, right: int) -> None:
    slots = left + window + right
    sequence = table_index(window, left, right, convention="published")
    assert sequence.flatten().tolist() == list(range(table_size(window, left, right, convention="published")))
    grid = table_index(window, left, right, is_grid=True, convention="published")
    assert grid.min() == 0
    assert grid.max() + 1 == table_size(window, left, right, is_grid=True, convention="published")
    for (i, a), (j, b) in itertools.product(enumerate(places(window, 0, True)), enumerate(places(slots, 0, True))):
        c = slots - 1
        assert grid[i, j] == (a[0] - b[0] + c) * slots + a[1] - b[1] + c


def test_the_published_grid_index_shares_entries() -> None:
    assert table_index(7, is_grid=True).unique().numel() == 169
    assert table_index(7, is_grid=True, convention="published").unique().numel() == 97


def bucket(distance: int, buckets: int, furthest: int, causal: bool) -> int:
    base = 0
    if causal:
        distance = max(-distance, 0)
    else:
        buckets //= 2
        base = buckets if distance > 0 else 0
        distance = abs(distance)
    exact = buckets // 2
    if distance < exact:
        return base + distance
    wider = math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact)
    return base + min(buckets - 1, exact + math.floor(wider + 1e-4))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (16, 12), (17, 24), (16, 100), (64, 130)])
def test_t5_buckets(causal: bool, buckets: int, furthest: int) -> None:
    distance = torch.arange(-300, 301)
    ours = t5_bucket(distance, buckets, furthest, is_causal=causal)
    assert ours.tolist() == [bucket(int(x), buckets, furthest, causal) for x in distance]
    assert ours.min() >= 0
    assert ours.max() < buckets
    assert (ours[:301].diff() <= 0).all()  # farther away, higher bucket
    assert int(ours[300]) == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("furthest", [1, 2, 3, 4, 8])
def test_a_range_without_logarithmic_buckets(causal: bool, furthest: int) -> None:
    # The published formula divides by log(1) here, or by a negative number.
    ours = t5_bucket(torch.arange(-40, 41), 16, furthest, is_causal=causal)
    exact = 8 if causal else 4
    for x in range(exact):
        assert ours[40 - x] == x
    last = 15 if causal else 7
    assert (ours[: 41 - max(exact, furthest)] == last).all()
    assert ((ours >= 0) & (ours < 16)).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window", "left", "right"), SIZES)
def test_t5_indices(window: int, left: int, right: int, is_causal: bool) -> None:
    buckets, furthest = t5_sizes(window, left)
    options = {"num_buckets": buckets, "max_distance": furthest, "is_causal": is_causal}

    def of(distance: int) -> int:
        return int(t5_bucket(torch.tensor(distance), buckets, furthest, is_causal=is_causal))

    slots = left + window + right
    line, published = (
        t5_index(window, left, right, convention=convention, **options) for convention in ("corrected", "published")
    )
    grid, flat = (
        t5_index(window, left, right, is_grid=True, convention=c, **options) for c in ("corrected", "published")
    )
    for a, j in itertools.product(range(window), range(slots)):
        assert line[a, j] == of(j - left - a)
        assert published[a, j] == of(j - a)
    assert (line.diagonal(left) == 0).all()
    for a, j in itertools.product(range(window**2), range(slots**2)):
        assert flat[a, j] == of(j - a)
        rows, columns = j // slots - left - a // window, j % slots - left - a % window
        assert grid[a, j] == of(rows) * buckets + of(columns)


def test_sizes_of_the_official_tables() -> None:
    assert t5_sizes(8, 4) == (16, 12)
    assert t5_sizes(64, 64) == (64, 128)
    assert t5_sizes(256) == (64, 256)


def test_what_cannot_be_is_refused() -> None:
    for wrong in ((0, 0, 0), (2, -1, 0), (2, 0, -1)):
        with pytest.raises(InputError, match="window_size must be"):
            table_index(*wrong)
        with pytest.raises(InputError, match="window_size must be"):
            t5_index(*wrong, num_buckets=16, max_distance=8)
    with pytest.raises(InputError, match="convention must be one of"):
        table_size(2, convention="official")
    for buckets, furthest in ((3, 8), (16, 0)):
        with pytest.raises(InputError, match="num_buckets must be"):
            t5_bucket(torch.arange(3), buckets, furthest)
