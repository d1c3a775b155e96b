"""Directions and features as random variables: unbiasedness, second moments, uniformity.

Every statement about a mean is tested at 5 standard errors: a false alarm in fewer than one of a million draws, with
fixed seeds.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from hf_linattn.functional import FavorStatistics, derive_seed, draw_projection, favor_log_features
from hf_linattn.ops.favor import neutral_statistics, optimal_shape

DIM = 4


def z_score(samples: Tensor, expected: Tensor | float) -> Tensor:
    """Distance of the mean over the first dimension from `expected`, in standard errors."""
    return (samples.mean(0) - expected) / (samples.std(0) / math.sqrt(len(samples)))


@cache
def haar(dim: int, features: int, regularized: bool = False) -> Tensor:
    """Many independent sets of orthogonal directions, `[sets, features, dim]`."""
    return draw_projection(40_000, features, dim, seed=1, regularized=regularized).double()


# -- directions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_orthogonal_directions_are_uniform(dim: int) -> None:
    w = haar(dim, dim)
    unit = w / w.norm(dim=-1, keepdim=True)
    assert z_score(w, 0.0).abs().max() < 5  # no component has a preferred sign
    assert z_score(unit.square(), 1 / dim).abs().max() < 5
    # chi(dim) lengths make each row N(0, I): even moments of every component, and length independent of direction.
    for power, moment in ((2, 1.0), (4, 3.0)):
        assert z_score(w.pow(power), moment).abs().max() < 5
    assert z_score(w.norm(dim=-1) * unit[..., 0], 0.0).abs().max() < 5
    gram = unit @ unit.transpose(-1, -2)
    torch.testing.assert_close(gram, torch.eye(dim).double().expand_as(gram), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dim", "features"), [(4, 4), (4, 6), (8, 16)])
def test_orthogonal_directions_estimate_the_kernel_without_bias(dim: int, features: int) -> None:
    # The published QR without sign correction gives 2.44 instead of e here, and 3.06 for -e1.
    w = haar(dim, features)
    e1, e2 = torch.eye(dim).double()[:2]
    for x, y in ((e1, e1), (-e1, -e1), (e2, -e1 / 2), (torch.full_like(e1, 0.5), e1)):
        feature = (w @ (x + y) - (x @ x + y @ y) / 2).exp().mean(-1)
        assert abs(z_score(feature, (x @ y).exp())) < 5
        assert feature.std() / 200 < 0.02 * (x @ y).exp()  # five of these are the published bias of 10 %


def test_blocks_are_orthogonal_and_independent() -> None:
    w = draw_projection(3, 10, 4, seed=0).double()
    gram = w @ w.transpose(-1, -2)
    block = torch.arange(10) // 4
    same = (block[:, None] == block) & ~torch.eye(10, dtype=torch.bool)
    assert gram[:, same].abs().max() < 1e-5
    assert gram[:, block[:, None] != block].abs().max() > 0.1
    across = haar(4, 6)
    assert z_score(across[:, 0] * across[:, 5], 0.0).abs().max() < 5


def test_regularised_lengths_and_independent_rows() -> None:
    fixed = draw_projection(2, 7, 5, seed=0, regularized=True)
    torch.testing.assert_close(fixed.norm(dim=-1), torch.full((2, 7), 5**0.5))
    free = draw_projection(5000, 3, 4, seed=0, orthogonal=False).double()
    assert z_score(free, 0.0).abs().max() < 5
    assert z_score(free.square(), 1.0).abs().max() < 5
    assert z_score(free[:, 0] * free[:, 1], 0.0).abs().max() < 5
    assert (free[:, 0] * free[:, 1]).sum(-1).abs().min() > 0  # not orthogonalised


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize(("dim", "features"), [(1, 1), (1, 5), (3, 2), (3, 7), (64, 100), (256, 8)])
def test_any_shape(orthogonal: bool, dim: int, features: int) -> None:
    w = draw_projection(2, features, dim, seed=4, orthogonal=orthogonal)
    assert w.shape == (2, features, dim)
    assert w.dtype == torch.float32
    assert w.isfinite().all()
    assert not torch.equal(w[0], w[1])


def test_draws_depend_on_seed_and_layer_alone() -> None:
    def draw(*parts: object) -> Tensor:
        return draw_projection(2, 6, 4, seed=derive_seed(*parts))

    torch.manual_seed(1)
    first = draw(0, 3, "projection")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(first, draw(0, 3, "projection"))
    assert torch.equal(before, torch.get_rng_state())
    others = [draw(0, 2, "projection"), draw(1, 3, "projection"), draw(0, 3, "other"), draw(3, 0, "projection")]
    assert not any(torch.equal(first, other) for other in others)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert all(0 <= derive_seed(i) < 2**63 for i in range(100))
    # The value is part of what a saved seed means: it may not change between versions.
    assert derive_seed(0, 3, "projection") == 8521804320413667678
    assert first[0, 0].tolist() == pytest.approx([-0.77322, 0.52138, 0.67825, 1.48311], abs=1e-4)


def test_default_dtype_does_not_change_the_draw() -> None:
    plain = draw_projection(1, 5, 3, seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(plain, draw_projection(1, 5, 3, seed=0))
    finally:
        torch.set_default_dtype(torch.float32)


# -- features -------------------------------------------------------------------------------------------------------


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(1, 1, 3, DIM, generator=generator, dtype=torch.float64) * 0.5 for _ in range(2))
    return x, y


STATISTICS = {
    "favor_plus": None,
    "neutral": [0.0, 0.0, 1.0, 0.0],
    "gerf": [0.0, 0.0, 1.0, -0.1],
    "positive": [0.0, 0.0, 1.0, 0.02],  # any A with 8 A < I is exact
    "saderf": [0.0, 0.0, [0.6, 1.5, 1.0, 2.0], -0.15],
    "saderf centred": [[0.3, -0.2, 0.1, 0.0], [-0.1, 0.2, 0.4, 0.1], [0.6, 1.5, 1.0, 2.0], -0.15],
    "gerf centred": [[0.3, -0.2, 0.1, 0.0], [-0.1, 0.2, 0.4, 0.1], 1.0, -0.15],
    "diagonal": [0.1, 0.2, [0.6, 1.5, 1.0, 2.0], [-0.2, -0.1, -0.3, 0.0]],
}


def statistics(name: str) -> FavorStatistics | None:
    values = STATISTICS[name]
    if values is None:
        return None
    return FavorStatistics(*(torch.tensor(v, dtype=torch.float64).expand(1, 1, 1, DIM) for v in values))


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("orthogonal", [True, False])
def test_features_are_unbiased(name: str, orthogonal: bool) -> None:
    x, y = points()
    w = draw_projection(1, 400_000, DIM, seed=2, orthogonal=orthogonal).double()
    log_query, log_key = favor_log_features(x, y, w, statistics(name))
    # Features of one orthogonal block depend on each other, so the blocks are what is averaged.
    features = (log_query[0, 0, :, None] + log_key[0, 0, None] + math.log(w.shape[1])).exp().unflatten(-1, (-1, DIM))
    blocks = features.mean(-1).flatten(0, 1).T
    exact = (x[0, 0] @ y[0, 0].T).exp().flatten()
    assert z_score(blocks, exact).abs().max() < 5
    assert (blocks.std(0) / len(blocks) ** 0.5 / exact).max() < 0.02
    # The sum over the features, with its 1 / M inside, is what stands beside exact logits.
    total = (log_query[0, 0, :, None] + log_key[0, 0, None]).logsumexp(-1).exp().flatten()
    torch.testing.assert_close(total, features.mean((-1, -2)).flatten())


def log_second_moment(z_square: Tensor, shape: Tensor, dim: int) -> Tensor:
    """`log E[(f f)^2]` for `A = a I` but for terms that do not depend on `a`: MC-checked below."""
    root = (1 - 4 * shape).log() - (1 - 8 * shape).log() / 2
    return dim * root + 2 * z_square * (1 - 4 * shape) / (1 - 8 * shape)


@pytest.mark.parametrize("a", [-0.3, -0.1, 0.0])
def test_second_moment_of_the_features(a: float) -> None:
    x, y = points()
    w = draw_projection(1, 400_000, DIM, seed=3, orthogonal=False).double()
    log_query, log_key = favor_log_features(
        x, y, w, FavorStatistics(*(torch.full((DIM,), c).double() for c in (0, 0, 1, a)))
    )
    squares = (2 * (log_query[0, 0] + log_key[0, 0] + math.log(w.shape[1]))).exp().T
    norms = x.square().sum(-1) + y.square().sum(-1)
    expected = (log_second_moment((x + y).square().sum(-1), torch.tensor(a).double(), DIM) - norms)[0, 0].exp()
    assert z_score(squares, expected).abs().max() < 5


@pytest.mark.parametrize("phi", [0.0, 0.05, 0.5, 1.0, 3.0, 20.0, 400.0])
def test_optimal_shape_is_the_minimum_of_the_mean_log_second_moment(phi: float) -> None:
    dim = 6
    optimum = float(optimal_shape(torch.tensor(phi, dtype=torch.float64)))
    grid = torch.cat([-torch.logspace(-6, 4, 20_001).double(), torch.linspace(0, 0.124, 2001).double()])
    curve = log_second_moment(torch.tensor(phi * dim).double(), grid, dim)
    at_optimum = log_second_moment(torch.tensor(phi * dim).double(), torch.tensor(optimum).double(), dim)
    assert optimum <= 0
    assert float(at_optimum) <= float(curve.min()) + 1e-12
    assert optimum == pytest.approx(float(grid[curve.argmin()]), rel=2e-3, abs=1e-5)


def test_neutral_statistics_are_favor_plus() -> None:
    x, y = points()
    w = draw_projection(1, 12, DIM, seed=0).double()
    for ours, plain in zip(
        favor_log_features(x, y, w, neutral_statistics(1, DIM)), favor_log_features(x, y, w), strict=True
    ):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", ["favor_plus", "gerf", "saderf centred"])
def test_kernel_error_falls_like_the_root_of_the_features(name: str) -> None:
    x, y = points()
    x, y = x.expand(1, 300, 3, DIM), y.expand(1, 300, 3, DIM)  # 300 heads, each with its own directions
    exact = (x[0, 0] @ y[0, 0].T).exp()
    errors = []
    counts = (4, 16, 64, 256)
    for count in counts:
        w = draw_projection(300, count, DIM, seed=9).double()
        log_query, log_key = favor_log_features(x, y, w, statistics(name))
        estimate = (log_query[0, :, :, None] + log_key[0, :, None]).logsumexp(-1).exp()
        errors.append(float(((estimate - exact) / exact).square().mean().sqrt()))
    slope = math.log(errors[-1] / errors[0]) / math.log(counts[-1] / counts[0])
    assert -0.62 < slope < -0.38, errors
