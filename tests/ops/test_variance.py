"""Random features as random variables: unbiasedness and the closed forms of their variance, by Monte Carlo.

Confidence: standard errors come from the closed forms themselves (which a wrong form cannot satisfy) or, where there
is none, from the sample. Limits are Bonferroni corrected over all comparisons of a run, so that correct code would
fail one run in a million; seeds are fixed, so that a run that passes once passes always.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import draw_projection, favor_attention, favor_log_features, softmax_attention
from hf_linattn.ops.favor.statistics import (
    FAVOR_VARIANTS,
    FavorStatistics,
    favor_statistics,
    neutral_statistics,
)
from hf_linattn.ops.favor.variance import (
    kernel_relative_variance,
    log_relative_moment,
    mean_log_second_moment,
    predicted_output_error,
)

DIM = 4
FEATURES = 400_000
FALSE_ALARM, TESTS = 1e-6, 100  # per run; an upper bound of the tests in this file that compare with a limit

NAMES = ["favor_plus", *FAVOR_VARIANTS, *(f"{variant} centred" for variant in FAVOR_VARIANTS)]
ISOTROPIC = [name for name in NAMES if name.split()[0] not in ("sderf", "dense")]
every_kind = pytest.mark.parametrize("name", NAMES)


def limit(comparisons: int) -> float:
    """The number of standard errors that one of so many comparisons may be off."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * TESTS * comparisons))


def assert_within(z: Tensor) -> None:
    assert z.isfinite().all()
    assert float(z.abs().max()) < limit(z.numel())


@cache
def directions(sets: int, count: int, seed: int, orthogonal: bool) -> Tensor:
    return draw_projection(sets, count, DIM, seed=seed, orthogonal=orthogonal).double()


def cloud(tokens: int = 24, batch: int = 1, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Correlated queries and keys with means, unscaled."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = [torch.eye(DIM) + 0.4 * normal(DIM, DIM) for _ in range(2)]
    q, k = (0.25 * normal(batch, 1, tokens, DIM) @ m + 0.15 * normal(1, 1, 1, DIM) for m in mix)
    return q, k * torch.tensor([0.6, 1.0, 1.5, 1.0])


def statistics(name: str) -> FavorStatistics | None:
    if name == "favor_plus":
        return None
    variant, *centred = name.split()
    return favor_statistics(*cloud(), variant=variant, centring=bool(centred))


def points() -> tuple[Tensor, Tensor]:
    q, k = cloud()
    return q[:, :, :3], k[:, :, :4]


def scaled(*tensors: Tensor) -> list[Tensor]:
    return [z * DIM**-0.25 for z in tensors]


def log_kernel(q: Tensor, k: Tensor) -> Tensor:
    x, y = scaled(q, k)
    return x @ y.mT


def relative_features(name: str, w: Tensor) -> Tensor:
    """`F / exp(x.y)` for every pair and direction, `[pairs, features]`."""
    q, k = points()
    log_query, log_key = favor_log_features(*scaled(q, k), w, statistics(name))
    log_features = log_query[0, 0, :, None] + log_key[0, 0, None] + math.log(w.shape[-2])
    return (log_features - log_kernel(q, k)[0, 0, ..., None]).exp().flatten(0, 1)


def moment(name: str, order: float) -> Tensor:
    return log_relative_moment(*points(), statistics(name), order=order)[0, 0].flatten().exp()


# -- one feature ----------------------------------------------------------------------------------------------------


@every_kind
def test_independent_features(name: str) -> None:
    """Mean and second moment against the closed forms, which also give the standard errors."""
    features = relative_features(name, directions(1, FEATURES, 2, False))
    second, fourth = moment(name, 2), moment(name, 4)
    assert_within((features.mean(-1) - 1) / ((second - 1) / FEATURES).sqrt())
    assert_within((features.square().mean(-1) - second) / ((fourth - second.square()) / FEATURES).sqrt())
    # Sharp enough to see something, and light enough tails for the normal limit.
    assert float(((fourth / second.square() - 1) / FEATURES).sqrt().max()) < 0.05


@every_kind
def test_third_moment(name: str) -> None:
    features = relative_features(name, directions(1, FEATURES, 3, False))
    third, sixth = moment(name, 3), moment(name, 6)
    assert_within((features.pow(3).mean(-1) - third) / ((sixth - third.square()) / FEATURES).sqrt())
    torch.testing.assert_close(moment(name, 1), torch.ones(12).double())
    torch.testing.assert_close(moment(name, 0), torch.ones(12).double())


@every_kind
def test_orthogonal_features_have_the_same_mean(name: str) -> None:
    features = relative_features(name, directions(1, FEATURES, 4, True))
    blocks = features.unflatten(-1, (-1, DIM)).mean(-1)  # features of one block depend on each other
    assert_within((blocks.mean(-1) - 1) / (blocks.std(-1) / blocks.shape[-1] ** 0.5))
    assert float((blocks.std(-1) / blocks.shape[-1] ** 0.5).max()) < 0.01


@pytest.mark.parametrize("shape", [-0.4, -0.1, 0.02])
def test_any_shape_below_an_eighth(shape: float) -> None:
    """Also positive ones, of which fewer moments are finite."""
    stats = neutral_statistics(1, DIM)._replace(shape=torch.full((1, 1, 1, DIM), shape, dtype=torch.float64))
    w = directions(1, FEATURES, 6, False)
    q, k = points()
    log_query, log_key = favor_log_features(*scaled(q, k), w, stats)
    log_features = log_query[0, 0, :, None] + log_key[0, 0, None] + math.log(FEATURES)
    features = (log_features - log_kernel(q, k)[0, 0, ..., None]).exp()
    second, fourth = (log_relative_moment(q, k, stats, order=p)[0, 0].exp() for p in (2, 4))
    assert_within((features.mean(-1) - 1) / ((second - 1) / FEATURES).sqrt())
    assert_within((features.square().mean(-1) - second) / ((fourth - second.square()) / FEATURES).sqrt())


def test_infinite_moments_are_refused() -> None:
    stats = neutral_statistics(1, DIM)._replace(shape=torch.full((1, 1, 1, DIM), 0.1))
    with pytest.raises(InputError, match="order 3 is infinite.*0.1"):
        log_relative_moment(*points(), stats, order=3)
    assert log_relative_moment(*points(), stats, order=2).isfinite().all()


# -- the mean over pairs --------------------------------------------------------------------------------------------


@every_kind
def test_mean_over_pairs(name: str) -> None:
    q, k = cloud(batch=3)
    mask = torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0] = True
    stats = statistics(name)
    ours = mean_log_second_moment(q, k, stats, key_mask=mask, scaling=0.3)
    assert ours.shape == (3, 1)
    for b in range(3):
        pairs = log_relative_moment(q[b : b + 1, :, mask[b]], k[b : b + 1, :, mask[b]], stats, scaling=0.3)
        torch.testing.assert_close(ours[b], pairs.mean((-2, -1))[0])
    crossed = mean_log_second_moment(q, k, stats, key_mask=mask, is_cross=True)[1]
    torch.testing.assert_close(crossed, log_relative_moment(q[1:2], k[1:2, :, mask[1]], stats).mean((-2, -1))[0])


def test_favor_plus_in_words() -> None:
    """Without statistics the log relative second moment is the squared length of the sum."""
    q, k = points()
    x, y = scaled(q, k)
    expected = (x[:, :, :, None] + y[:, :, None]).square().sum(-1)
    torch.testing.assert_close(log_relative_moment(q, k), expected)
    torch.testing.assert_close(log_relative_moment(q, k, neutral_statistics(1, DIM)), expected)
    assert log_relative_moment(q.half(), k.half()).dtype == torch.float32


# -- many features --------------------------------------------------------------------------------------------------

SETS = 40_000


@pytest.mark.parametrize("name", ISOTROPIC)
@pytest.mark.parametrize("num_features", [DIM, DIM + 2])
def test_variance_of_orthogonal_features(name: str, num_features: int) -> None:
    w = directions(SETS, num_features, 7, True)
    q, k = (0.7 * z for z in points())  # lighter tails for FAVOR+
    x, y = (z.expand(1, SETS, -1, -1) for z in scaled(q, k))
    log_query, log_key = favor_log_features(x, y, w, statistics(name))
    log_estimate = (log_query[0, :, :, None] + log_key[0, :, None]).logsumexp(-1)
    squares = ((log_estimate - log_kernel(q, k)[0]).exp() - 1).square()
    expected = kernel_relative_variance(q, k, num_features, statistics(name), orthogonal=True)[0, 0]
    assert_within((squares.mean(0) - expected) / (squares.std(0) / SETS**0.5))
    assert float((squares.std(0) / SETS**0.5 / expected).max()) < 0.05
    independent = kernel_relative_variance(q, k, num_features, statistics(name))[0, 0]
    assert (expected < independent).all()


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 64])
def test_orthogonal_variance_is_a_hypergeometric_function(dim: int) -> None:
    special = pytest.importorskip("scipy.special")
    generator = torch.Generator().manual_seed(dim)
    q, k = (torch.randn(1, 1, 5, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    k[0, 0, 0] = -q[0, 0, 0]
    square = (q[:, :, :, None] + k[:, :, None]).square().sum(-1)
    pair = torch.tensor(special.hyp1f1(dim, dim / 2, square.numpy() / 2)) * (-square).exp() - 1
    for count in (1, dim, 2 * dim + 1):
        blocks = [dim] * (count // dim) + [count % dim]
        weight = sum(size * (size - 1) for size in blocks) / count**2
        expected = square.expm1() / count + weight * pair
        ours = kernel_relative_variance(q, k, count, orthogonal=True, scaling=1.0)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        assert (pair <= 1e-12).all()


def test_orthogonal_variance_needs_one_shape_parameter() -> None:
    with pytest.raises(UnsupportedError, match="different ones per coordinate"):
        kernel_relative_variance(*points(), 8, statistics("dense"), orthogonal=True)
    assert kernel_relative_variance(*points(), 8, statistics("dense")).isfinite().all()
    with pytest.raises(InputError, match="num_features must be at least 1; got 0"):
        kernel_relative_variance(*points(), 0)


COUNTS = (8, 32, 128, 512)


def slope(errors: list[Tensor], counts: tuple[int, ...] = COUNTS) -> tuple[float, float]:
    """Of log root mean squared error against log count, weighted least squares, with its standard error.

    Each element of `errors` holds one mean squared error per independent set of directions.
    """
    means = torch.stack([e.mean() for e in errors])
    noise = torch.stack([e.std() / len(e) ** 0.5 for e in errors]) / means / 2
    weight = noise.pow(-2)
    at = torch.tensor(counts, dtype=torch.float64).log()
    at = at - (weight * at).sum() / weight.sum()
    spread = (weight * at.square()).sum()
    return float((weight * at * means.log() / 2).sum() / spread), float(spread.rsqrt())


@every_kind
@pytest.mark.parametrize("orthogonal", [False, True])
def test_kernel_error_falls_like_the_root_of_the_features(name: str, orthogonal: bool) -> None:
    sets = 1500
    q, k = points()
    x, y = (z.expand(1, sets, -1, -1) for z in scaled(q, k))
    errors = []
    for count in COUNTS:
        w = directions(sets, count, 9, orthogonal)
        log_query, log_key = favor_log_features(x, y, w, statistics(name))
        ratio = (log_query[0].exp() @ log_key[0].exp().mT) / log_kernel(q, k)[0].exp()
        errors.append((ratio - 1).square().mean((1, 2)))
    found, noise = slope(errors)
    assert abs(found + 0.5) < limit(1) * noise
    assert noise < 0.02


# -- attention ------------------------------------------------------------------------------------------------------


def output_errors(name: str, count: int, sets: int, orthogonal: bool = False) -> tuple[Tensor, Tensor]:
    """Squared error of every query's output, `[sets, queries]`, and its prediction."""
    q, k = points()
    v = torch.randn(1, 1, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stats = statistics(name)
    w = directions(sets, count, 11, orthogonal)
    many = [z.expand(1, sets, -1, -1) for z in (q, k, v)]
    out = favor_attention(*many, w, statistics=stats, is_cross=True)
    errors = (out - softmax_attention(q, k, v))[0].square().sum(-1)
    return errors, predicted_output_error(q, k, v, count, stats)[0, 0]


@every_kind
def test_predicted_output_error(name: str) -> None:
    """First order in 1 / M: at M = 2000 what is left out is of the order of 1 %."""
    sets = 1500
    errors, expected = output_errors(name, 2000, sets)
    noise = errors.std(0) / sets**0.5
    assert float((noise / expected).max()) < 0.05
    assert ((errors.mean(0) - expected).abs() < limit(3) * noise + 0.03 * expected).all()


@pytest.mark.parametrize(
    ("shape", "scale"),  # as far out as the tails allow
    [
        ((0.0, 0.0, 0.0, 0.0), 0.6),
        ((-0.3, -0.3, -0.3, -0.3), 1.5),
        ((-0.5, -0.1, -0.3, -0.4), 1.2),
        ((0.02, -0.2, 0.01, -0.1), 0.6),
    ],
)
def test_first_order_term_of_the_output_error(shape: tuple[float, ...], scale: float) -> None:
    """What one feature adds, exactly: `|sum_n p_n F_n / exp(x.y_n) (v_n - o)|^2` in the mean."""
    q, k = (scale * z for z in points())
    v = torch.randn(1, 1, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stats = favor_statistics(*cloud(), variant="dense")._replace(
        shape=torch.tensor(shape).double().expand(1, 1, 1, DIM)
    )
    w = directions(1, FEATURES, 8, False)
    log_query, log_key = favor_log_features(*scaled(q, k), w, stats)
    log_features = log_query[0, 0, :, None] + log_key[0, 0, None] + math.log(FEATURES)
    features = (log_features - log_kernel(q, k)[0, 0, ..., None]).exp()  # [queries, keys, features]
    weights = torch.softmax(log_kernel(q, k)[0, 0], -1)
    step = weights[..., None] * (v[0] - (weights @ v[0, 0])[:, None])
    squares = (features.mT @ step).square().sum(-1)
    expected = predicted_output_error(q, k, v, 1, stats)[0, 0]
    noise = squares.std(-1) / FEATURES**0.5
    assert_within((squares.mean(-1) - expected) / noise)
    assert float((noise / expected).max()) < 0.02


@every_kind
def test_attention_error_falls_with_the_features(name: str) -> None:
    counts = (64, 256, 1024)
    found, noise = slope([output_errors(name, count, 1000, True)[0].mean(-1) for count in counts], counts)
    # Self-normalised: the slope of -1/2 is reached in the limit only.
    assert abs(found + 0.5) < limit(1) * noise + 0.03
    assert noise < 0.02


def test_centred_dense_features_have_the_least_predicted_error() -> None:
    q, k = cloud()
    v = torch.randn(1, 1, 24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = {name: float(predicted_output_error(q, k, v, 64, statistics(name)).mean()) for name in NAMES}
    assert errors["dense centred"] < errors["saderf"] < errors["favor_plus"]
