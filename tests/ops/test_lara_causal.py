"""LARA with calibrated proposals: the reference, unbiasedness, variance, and the causal form."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import MASKS, assert_same, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import draw_projection, lara_attention, softmax_attention
from hf_linattn.ops.lara.features import proposal_feature_map
from hf_linattn.ops.lara.proposals import CalibratedProposals, sample_proposals
from hf_linattn.ops.reference import lara_reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(scale: float = 1.0) -> list[Tensor]:
    return [normal(2, 2, 23, 4, seed=seed) * scale for seed in range(3)]


def some_proposals(count: int = 3, each: int = 2, *, antithetic: bool = False) -> CalibratedProposals:
    return sample_proposals(normal(2, count, 4, seed=8), normal(2, count * each, 4, seed=9), antithetic=antithetic)


@given(
    is_causal=st.booleans(),
    mask=st.sampled_from(["none", "right", "left", "holes", "all"]),
    window=st.sampled_from([0, 1, 3, 8, 40]),
    count=st.integers(1, 4),
    each=st.integers(1, 3),
    antithetic=st.booleans(),
    chunk_size=st.sampled_from([1, 4, 32]),
    global_tokens=st.sampled_from([0, 2]),
    offset=st.booleans(),
)
@settings(max_examples=examples(120), derandomize=True, database=None)
def test_against_the_reference(
    is_causal: bool,
    mask: str,
    window: int,
    count: int,
    each: int,
    antithetic: bool,
    chunk_size: int,
    global_tokens: int,
    offset: bool,
) -> None:
    q, k, v = inputs()
    proposals = some_proposals(count, each, antithetic=antithetic)
    assert proposals.samples.shape == (2, count * each * (1 + antithetic), 4)
    where = {"num_global_tokens": 0 if is_causal else global_tokens}
    shifts = torch.tensor([0.4, -1.1]).double() if offset else None
    ours = lara_attention(
        q,
        k,
        v,
        proposals=proposals,
        is_causal=is_causal,
        key_mask=MASKS[mask],
        window_size=window,
        chunk_size=chunk_size,
        offset=shifts,
        **where,
    )
    shared = {"proposals": proposals, "offset": shifts, "key_mask": MASKS[mask], "window_size": window}
    assert_same(ours, lara_reference(q, k, v, is_causal=is_causal, **shared, **where))


def test_calibrated_lara_on_images() -> None:
    q, k, v = (z[:, :, :21] for z in inputs())
    proposals = some_proposals()
    options = {"proposals": proposals, "window_size": 2, "grid": (4, 5), "num_global_tokens": 1}
    assert_same(lara_attention(q, k, v, **options), lara_reference(q, k, v, **options))
    with pytest.raises(UnsupportedError, match="sequence, not an image"):
        lara_attention(q, k, v, proposals=proposals, window_size=2, grid=(4, 5), is_causal=True)


# -- the estimate of exp(x . y) -------------------------------------------------------------------------------------


def estimates(x: Tensor, y: Tensor, centroids: Tensor, noise: Tensor, *, antithetic: bool = False) -> Tensor:
    """`[draws]` from noise `[draws, samples, dim]`; x, y `[dim]`, centroids `[proposals, dim]`."""
    draws = noise.shape[0]
    proposals = sample_proposals(centroids.expand(draws, -1, -1), noise, antithetic=antithetic)
    x, y = x.expand(1, draws, 1, -1), y.expand(1, draws, 1, -1)
    feature_map = proposal_feature_map(x, proposals)
    a, c = feature_map.query_weights(x), feature_map.key_weights(y)
    return torch.logsumexp((a.dense() + c.dense()).flatten(1, 2), -1).exp().flatten()


def z_value(draws: Tensor, expected: Tensor) -> float:
    return float((draws.mean() - expected) / (draws.std() / len(draws) ** 0.5))


@pytest.mark.parametrize("dim", [1, 3, 6])
@pytest.mark.parametrize(("count", "each"), [(1, 1), (1, 4), (3, 1), (3, 2), (8, 1)])
@pytest.mark.parametrize("noise", ["independent", "orthogonal", "antithetic"])
def test_the_estimate_is_unbiased(dim: int, count: int, each: int, noise: str) -> None:
    # Proposals that do not fit at all as well: any centroids give the right mean. The limit of 4.5 standard errors is
    # passed by a right estimator for all but 45 * 2 * 7e-6 = 6e-4 of all seeds.
    many = 20_000
    centroids = normal(count, dim, seed=1) * 0.7
    if noise == "orthogonal":
        drawn = draw_projection(many, count * each, dim, seed=2).double()
    else:
        drawn = normal(many, count * each, dim, seed=2)
    for seed in (3, 4):
        x, y = normal(dim, seed=seed) * 0.5, normal(dim, seed=seed + 10) * 0.5
        values = estimates(x, y, centroids, drawn, antithetic=noise == "antithetic")
        assert abs(z_value(values, (x @ y).exp())) < 4.5


@pytest.mark.parametrize("each", [1, 4])
def test_variance_for_one_proposal(each: int) -> None:
    # E[estimate^2] = exp(2 x.y) (1 + (exp(|x + y - mu|^2) - 1) / M): at mu = x + y there is no variance at all.
    x, y = normal(3, seed=3) * 0.4, normal(3, seed=4) * 0.4
    noise = normal(200_000, each, 3, seed=5)
    for distance in (0.0, 0.3, 0.6):
        mu = x + y + distance * torch.tensor([1.0, 0, 0]).double()
        squares = estimates(x, y, mu[None], noise).square()
        expected = (2 * x @ y).exp() * (1 + (math.exp(distance**2) - 1) / each)
        if distance:
            assert abs(z_value(squares, expected)) < 4.5
        else:
            torch.testing.assert_close(squares, expected.expand_as(squares), rtol=1e-12, atol=0)


def test_second_moment_of_mixture_importance_sampling() -> None:
    # One sample of each of C proposals: the variance is the sum over them of that of p f / (sum_c q_c), each by
    # quadrature in one dimension, where f p is exp(x.y) N(w; x + y, 1).
    x, y, centroids = torch.tensor([0.7]).double(), torch.tensor([0.5]).double(), torch.tensor([[-1.0], [0.5], [2.0]])
    centroids = centroids.double()
    w = torch.linspace(-14, 14, 40_001, dtype=torch.float64)
    step = w[1] - w[0]
    q = torch.exp(-((w - centroids) ** 2) / 2) / math.sqrt(2 * math.pi)
    p = torch.exp(-((w - x - y) ** 2) / 2) / math.sqrt(2 * math.pi)
    term = (x @ y).exp() * p / q.sum(0)
    means, squares = (q * term).sum(-1) * step, (q * term**2).sum(-1) * step
    torch.testing.assert_close(means.sum(), (x @ y).exp(), rtol=1e-9, atol=0)
    variance = (squares - means**2).sum()
    draws = estimates(x, y, centroids, normal(400_000, 3, 1, seed=6))
    deviation = (draws - (x @ y).exp()).square()
    assert abs(z_value(deviation, variance)) < 4.5


def test_calibrated_proposals_beat_badly_placed_ones() -> None:
    q, k, v = inputs(0.8)
    root = 4**-0.25
    centroids = (q + k.mean(2, keepdim=True))[0, :, ::3] * root
    exact = softmax_attention(q, k, v, is_causal=True)
    errors = []
    for shift in (0.0, 2.5):
        proposals = sample_proposals(centroids + shift, normal(2, 8 * centroids.shape[1], 4, seed=3))
        errors.append((lara_attention(q, k, v, proposals=proposals, is_causal=True) - exact).norm())
    assert errors[0] < 0.5 * errors[1]


# -- the causal form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 4, 23])
def test_no_token_sees_a_later_one(window: int) -> None:
    q, k, v = (z.requires_grad_() for z in inputs())
    options = {"proposals": some_proposals(), "is_causal": True, "window_size": window, "chunk_size": 4}
    out = lara_attention(q, k, v, **options)
    for t in (0, 5, 21):
        for grad in torch.autograd.grad(out[:, :, : t + 1].sin().sum(), (q, k, v), retain_graph=True):
            assert (grad[:, :, t + 1 :] == 0).all()
        changed = [torch.cat([z[:, :, : t + 1], z[:, :, t + 1 :] * 50 - 1], 2) for z in (q, k, v)]
        assert_same(lara_attention(*changed, **options)[:, :, : t + 1], out[:, :, : t + 1])
        prefix = lara_attention(*(z[:, :, : t + 1] for z in (q, k, v)), **options)
        assert_same(prefix, out[:, :, : t + 1])
        last = lara_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], **options)
        assert_same(last, out[:, :, t : t + 1])


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_over_everything_is_softmax(is_causal: bool) -> None:
    q, k, v = inputs()
    ours = lara_attention(q, k, v, proposals=some_proposals(), is_causal=is_causal, window_size=23)
    assert_same(ours, softmax_attention(q, k, v, is_causal=is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [0, 2])
def test_gradients_also_of_the_proposals(is_causal: bool, masked: bool, window: int) -> None:
    q, k, v = (z[:1, :1, :7, :2].clone().requires_grad_() for z in inputs())
    centroids, noise = (normal(1, n, 2, seed=n).requires_grad_() for n in (3, 6))
    offset = torch.tensor([0.3]).double().requires_grad_()
    options = {"is_causal": is_causal, "window_size": window, "chunk_size": 2}
    options["key_mask"] = torch.tensor([[0, 1, 1, 0, 1, 1, 1]]).bool() if masked else None

    def run(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, noise: Tensor, offset: Tensor) -> Tensor:
        proposals = sample_proposals(centroids, noise, antithetic=True)
        return lara_attention(q, k, v, proposals=proposals, offset=offset, **options)

    torch.autograd.gradcheck(run, (q, k, v, centroids, noise, offset), fast_mode=True)


def test_wrong_inputs_are_refused() -> None:
    q, k, v = inputs()
    proposals = some_proposals()
    with pytest.raises(UnsupportedError, match="landmarks.*hf_linattn.calibrate.*proposals=CalibratedProposals"):
        lara_attention(q, k, v, is_causal=True)
    fixed = {
        "weighting": "optimal",
        "query_map": torch.tanh,
        "key_map": torch.tanh,
        "map_stage": "tokens",
        "mixing": "key",
        "noise": normal(2, 2, 6, 4),
        "samples_per_landmark": 2,
        "antithetic": True,
    }
    for name, value in fixed.items():
        with pytest.raises(InputError, match=f"Calibrated proposals.*{name} must be"):
            lara_attention(q, k, v, proposals=proposals, **{name: value})
    with pytest.raises(InputError, match=r"as many rows for each of the 3 proposals.*got 4"):
        sample_proposals(normal(2, 3, 4), normal(2, 4, 4))
    wrong = {
        r"centroids must be \[heads, proposals, head_dim\]": CalibratedProposals(normal(1, 3, 4), normal(2, 6, 4)),
        r"samples must be \[heads, samples, head_dim\]": CalibratedProposals(normal(2, 3, 4), normal(2, 6, 5)),
        "same number of samples; got 5 samples of 3": CalibratedProposals(normal(2, 3, 4), normal(2, 5, 4)),
    }
    for message, given_proposals in wrong.items():
        with pytest.raises(InputError, match=message):
            lara_attention(q, k, v, proposals=given_proposals)
    with pytest.raises(UnsupportedError, match="num_heavy_keys"):
        lara_attention(q, k, v, proposals=proposals, is_causal=True, num_heavy_keys=1)
