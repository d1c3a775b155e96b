"""k-means per head: deterministic, as good as it should be, and at ease with coinciding points."""

from __future__ import annotations

import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.errors import InputError
from hf_linattn.ops.lara import kmeans as module
from hf_linattn.ops.lara.kmeans import kmeans


def points(heads: int = 2, count: int = 40, dim: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(heads, count, dim, generator=torch.Generator().manual_seed(seed))


def cost(given: Tensor, centroids: Tensor) -> Tensor:
    return torch.cdist(given.double(), centroids.double()).square().amin(-1).mean(-1)


def test_separated_groups_are_found() -> None:
    centres = torch.tensor([[0.0, 0], [40, 0], [0, 40], [40, 40], [20, 100]])
    shifts = torch.tensor([1000.0, -3.0])[:, None, None]  # far from the origin
    given = (centres.repeat(30, 1) + points(1, 150, 2)[0]) + shifts
    for seed in range(5):
        found = kmeans(given, 5, seed=seed)
        for head in range(2):
            gap = torch.cdist(centres + shifts[head], found[head]).amin(-1)
            assert (gap < 1.0).all()


def test_a_seed_gives_the_same_result_and_heads_are_alone() -> None:
    given = points(3)
    before = torch.random.get_rng_state()
    first = kmeans(given, 6, seed=1)
    assert torch.equal(first, kmeans(given, 6, seed=1))
    assert not torch.equal(first, kmeans(given, 6, seed=2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.dtype == given.dtype
    changed = given.clone()
    changed[1] += 5
    assert torch.equal(kmeans(changed, 6, seed=1)[[0, 2]], first[[0, 2]])


@given(count=st.integers(1, 30), centroids=st.integers(1, 8), distinct=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=examples(60), derandomize=True, database=None)
def test_centroids_are_the_means_of_their_points(count: int, centroids: int, distinct: int, seed: int) -> None:
    centroids = min(centroids, count)
    given = points(2, count, 2, seed)[:, torch.arange(count) % distinct].double()
    found = kmeans(given, centroids, seed=seed, max_iterations=1000)
    assert found.isfinite().all()
    nearest = torch.cdist(given, found).argmin(-1)
    for head in range(2):
        for c in nearest[head].unique():
            mean = given[head][nearest[head] == c].mean(0)
            torch.testing.assert_close(found[head, c], mean, rtol=0, atol=1e-9)
    if centroids >= min(distinct, count):  # a centroid for every distinct point
        assert float(cost(given, found).max()) < 1e-20


def test_every_step_lowers_the_cost() -> None:
    given = points(2, 300, 4)
    costs = torch.stack([cost(given, kmeans(given, 12, seed=0, max_iterations=i)) for i in (0, 1, 2, 5, 30)])
    assert (costs.diff(dim=0) <= 1e-6).all()
    start = torch.stack([cost(given, kmeans(given, 12, seed=s, max_iterations=0)) for s in range(20)]).mean()
    assert float(costs[-1].mean()) < 0.9 * float(start)


def test_a_centroid_without_points_moves_to_the_farthest(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.tensor([[[5.0], [6.0], [7.0], [15.0]]])
    monkeypatch.setattr(module, "_spread_start", lambda *_: torch.tensor([[[6.0], [50.0], [60.0]]]).double())
    found = kmeans(given, 3, seed=0)
    assert found.flatten().sort().values.tolist() in ([5.0, 6.5, 15.0], [5.5, 7.0, 15.0])


@pytest.mark.parametrize(
    ("given", "count", "message"),
    [
        (points(1, 3), 4, "4 centroids.*at least as many"),
        (points(1, 3), 0, "0 centroids"),
        (points(1, 3)[0], 2, "heads, points, dim"),
        (points(1, 3) * float("nan"), 2, "finite"),
    ],
)
def test_wrong_inputs_are_refused(given: Tensor, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kmeans(given, count, seed=0)
