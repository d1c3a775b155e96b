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

from hf_linattn.functional import derive_seed, draw_projection

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
    several = haar(4, 6)
    assert z_score(several[:, 0] * several[:, 5], 0.0).abs().max() < 5


def test_regularised_lengths_and_independent_rows() -> None:
    fixed = draw_projection(2, 7, 5, seed=0, regularized=True)
    torch.testing.assert_close(fixed.norm(dim=-1), torch.full((2, 7), 5**0.5))
    free = draw_projection(5000, 3, 4, seed=0, orthogonal=False).double()
    assert z_score(free, 0.0).abs().max() < 5
    assert z_score(free.square(), 1.0).abs().max() < 5
    assert z_score(free[:, 0] * free[:, 1], 0.0).abs().max() < 5
    assert (free[:, 0] * free[:, 1]).sum(-1).abs().min() > 0  # not orthogonalised


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_the_first_component_has_no_preferred_sign(dim: int) -> None:
    """QR without sign correction makes it negative always. How often it is positive is binomial: five deviations."""
    first = haar(dim, dim)[:, 0, 0]
    assert abs(int((first > 0).sum()) - len(first) / 2) < 5 * math.sqrt(len(first)) / 2
    torch.testing.assert_close(first.abs().mean(), torch.tensor(math.sqrt(2 / math.pi)).double(), rtol=0.03, atol=0)


@pytest.mark.parametrize("options", [{}, {"orthogonal": False}, {"regularized": True}])
def test_one_set_for_all_heads(options: dict[str, bool]) -> None:
    shared = draw_projection(None, 7, 4, seed=6, **options)
    assert shared.shape == (7, 4)
    assert torch.equal(shared, draw_projection(1, 7, 4, seed=6, **options)[0])


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize(("dim", "features"), [(1, 1), (1, 5), (3, 2), (3, 7), (64, 100), (256, 8)])
def test_directions_of_any_shape(orthogonal: bool, dim: int, features: int) -> None:
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
