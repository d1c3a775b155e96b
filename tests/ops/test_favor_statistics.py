"""FAVOR#'s statistics: what each variant has to satisfy, degenerate data, padding."""

from __future__ import annotations

import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_inputs import DIM, HEADS, MASK, centred_or_not, every_variant, inputs
from torch import Tensor

from hf_linattn.errors import InputError
from hf_linattn.ops.favor.fit import optimal_shape
from hf_linattn.ops.favor.statistics import (
    FAVOR_VARIANTS,
    FavorMoments,
    FavorStatistics,
    favor_statistics,
    neutral_statistics,
)
from hf_linattn.ops.favor.variance import mean_log_second_moment

DENSE = ("aderf", "sderf", "dense")


def scaled(*tensors: Tensor) -> list[Tensor]:
    return [z * z.shape[-1] ** -0.25 for z in tensors]


def as_matrix(transform: Tensor) -> Tensor:
    return torch.diag_embed(transform.squeeze(-2)) if transform.shape[-2] == 1 else transform


def second(z: Tensor) -> Tensor:
    return z.mT @ z / z.shape[-2]


def eye(dim: int = DIM) -> Tensor:
    return torch.eye(dim, dtype=torch.float64)


def root(matrix: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh(matrix)
    return (axes * values.sqrt().unsqueeze(-2)) @ axes.mT


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


# -- what defines each variant --------------------------------------------------------------------------------------


@every_variant
@centred_or_not
def test_means_and_shape(variant: str, centring: bool) -> None:
    q, k = inputs()
    stats = favor_statistics(q, k, variant=variant, centring=centring)
    x, y = scaled(q, k)
    for mean, z in ((stats.query_mean, x), (stats.key_mean, y)):
        torch.testing.assert_close(mean, z.mean(2, keepdim=True) if centring else torch.zeros_like(mean))
    x, y = stats.transform(x, y)
    pairs = x[:, :, :, None] + y[:, :, None]
    phi = pairs.square().mean((2, 3)).unsqueeze(2)  # over all pairs
    if variant not in ("sderf", "dense"):
        phi = phi.mean(-1, keepdim=True).expand_as(phi)
    torch.testing.assert_close(stats.shape, (1 - 2 * phi - ((2 * phi + 1) ** 2 + 8 * phi).sqrt()) / 16)
    assert stats.query_transform.shape == (2, HEADS, DIM if variant in DENSE else 1, DIM)


@every_variant
@centred_or_not
def test_dot_products_stay(variant: str, centring: bool) -> None:
    q, k = inputs()
    stats = favor_statistics(q, k, variant=variant, centring=centring)
    product = as_matrix(stats.query_transform) @ as_matrix(stats.key_transform).mT
    torch.testing.assert_close(product, eye().expand_as(product), rtol=0, atol=1e-12)


@centred_or_not
def test_transforms_of_every_variant(centring: bool) -> None:
    q, k = inputs()
    x, y = scaled(q, k)
    if centring:
        x, y = x - x.mean(2, keepdim=True), y - y.mean(2, keepdim=True)

    def of(variant: str) -> FavorStatistics:
        return favor_statistics(q, k, variant=variant, centring=centring)

    assert torch.equal(of("gerf").query_transform, torch.ones(2, HEADS, 1, DIM, dtype=torch.float64))
    psi = (y.square().mean(2, keepdim=True) / x.square().mean(2, keepdim=True)) ** 0.25
    torch.testing.assert_close(of("saderf").query_transform, psi)

    m1, m2 = second(x), second(y)
    inverse = torch.linalg.inv(root(m1))
    balanced = inverse @ root(root(m1) @ m2 @ root(m1)) @ inverse  # T'T
    aderf = of("aderf")
    torch.testing.assert_close(aderf.query_transform @ aderf.query_transform.mT, balanced)
    torch.testing.assert_close(aderf.query_transform, aderf.query_transform.mT)  # one of many square roots
    torch.testing.assert_close(second(x @ aderf.query_transform), second(y @ aderf.key_transform))

    sums = x[:, :, :, None] + y[:, :, None]
    sums = sums.flatten(2, 3)
    sderf = of("sderf")
    torch.testing.assert_close(sderf.query_transform, sderf.key_transform)
    moment = second(sums @ sderf.query_transform)
    torch.testing.assert_close(off_diagonal(moment), torch.zeros_like(moment), rtol=0, atol=1e-10)

    dense = of("dense")
    torch.testing.assert_close(second(x @ dense.query_transform), second(y @ dense.key_transform))
    ours = (x @ dense.query_transform)[:, :, :, None] + (y @ dense.key_transform)[:, :, None]
    moment = second(ours.flatten(2, 3))
    torch.testing.assert_close(off_diagonal(moment), torch.zeros_like(moment), rtol=0, atol=1e-10)
    for stats in (sderf, dense):  # the sign of an axis is fixed
        most = stats.query_transform.abs().argmax(-2, keepdim=True)
        assert (stats.query_transform.gather(-2, most) > 0).all()


@given(seed=st.integers(0, 10_000), tokens=st.integers(2, 30), dim=st.integers(1, 6))
@settings(max_examples=examples(25))
def test_more_general_statistics_have_less_variance(seed: int, tokens: int, dim: int) -> None:
    """The order that follows from what each variant minimises over."""
    q, k = inputs(tokens, dim, seed)

    def moment(variant: str, centring: bool) -> Tensor:
        stats = favor_statistics(q, k, variant=variant, centring=centring)
        return mean_log_second_moment(q, k, stats)

    plus = mean_log_second_moment(q, k)
    for centring in (False, True):
        gerf, saderf, aderf, sderf, dense = (moment(variant, centring) for variant in FAVOR_VARIANTS)
        for more, less in ((plus, gerf), (gerf, saderf), (saderf, aderf), (aderf, dense), (gerf, sderf)):
            assert (less <= more + 1e-4 * (1 + more.abs())).all()  # the floor under small moments costs a little
    for variant in FAVOR_VARIANTS:
        assert (moment(variant, True) <= moment(variant, False) * (1 + 1e-4) + 1e-4).all()


@pytest.mark.parametrize("phi", [0.0, 0.05, 0.5, 1.0, 3.0, 20.0, 400.0])
def test_optimal_shape_against_a_grid(phi: float) -> None:
    optimum = float(optimal_shape(torch.tensor(phi, dtype=torch.float64)))

    def log_moment(a: Tensor) -> Tensor:  # of one coordinate
        return (1 - 4 * a).log() - (1 - 8 * a).log() / 2 + phi / (1 - 8 * a)

    grid = torch.cat([-torch.logspace(-6, 4, 20_001).double(), torch.linspace(0, 0.124, 2001).double()])
    curve = log_moment(grid)
    assert optimum <= 0
    assert float(log_moment(torch.tensor(optimum).double())) <= float(curve.min()) + 1e-12
    assert optimum == pytest.approx(float(grid[curve.argmin()]), rel=2e-3, abs=1e-5)


def test_optimal_shape_is_elementwise() -> None:
    phi = torch.tensor([[0.1, 2.0], [0.0, 30.0]])
    one_by_one = [[float(optimal_shape(p)) for p in row] for row in phi]
    torch.testing.assert_close(optimal_shape(phi), torch.tensor(one_by_one))


# -- degenerate data ------------------------------------------------------------------------------------------------


def degenerate(name: str, dim: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, HEADS, 5, dim, generator=generator) for _ in range(2))
    spread = torch.logspace(-8, 3, dim)
    return {
        "few tokens": (q, k),
        "one token": (q[:, :, :1], k[:, :, :1]),
        "equal keys": (q, k[:, :, :1].expand_as(k)),
        "zero queries": (torch.zeros_like(q), k),
        "zero keys": (q, torch.zeros_like(k)),
        "all zero": (torch.zeros_like(q), torch.zeros_like(k)),
        "equal and constant": (torch.full_like(q, 2.0), torch.full_like(k, 3.0)),
        "wide spectra": (q.repeat(1, 1, 8, 1) * spread, torch.randn(1, HEADS, 40, dim, generator=generator) * spread),
        "tiny": (q * 1e-15, k * 1e-15),
        "huge": (q * 1e4, k * 1e4),
        "unequal": (q * 1e-10, k * 1e4),
    }[name]


DEGENERATE = [
    "few tokens",
    "one token",
    "equal keys",
    "zero queries",
    "zero keys",
    "all zero",
    "equal and constant",
    "wide spectra",
    "tiny",
    "huge",
    "unequal",
]


@pytest.mark.parametrize("name", DEGENERATE)
@every_variant
@centred_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_data(name: str, variant: str, centring: bool, dtype: torch.dtype) -> None:
    q, k = (z.to(dtype) for z in degenerate(name))
    stats = favor_statistics(q, k, variant=variant, centring=centring)
    assert all(s.isfinite().all() and s.dtype == dtype for s in stats)
    assert (8 * stats.shape < 1).all()
    product = as_matrix(stats.query_transform).double() @ as_matrix(stats.key_transform).mT.double()
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(product, eye(16).expand_as(product), rtol=0, atol=2e4 * precision)
    x, y = stats.transform(*scaled(q, k))
    plain_x, plain_y = scaled(q, k)
    exact = (plain_x - stats.query_mean).double() @ (plain_y - stats.key_mean).mT.double()
    size = (plain_x - stats.query_mean).norm(dim=-1).amax() * (plain_y - stats.key_mean).norm(dim=-1).amax()
    assert float((x.double() @ y.mT.double() - exact).abs().max()) <= 20 * precision * float(size) + 1e-30


@every_variant
def test_a_broken_row_stays_alone(variant: str) -> None:
    q, k = inputs()
    good = favor_statistics(q[1:], k[1:], variant=variant)
    q[0, :, 3] = float("nan")
    stats = favor_statistics(q, k, variant=variant)
    for ours, expected in zip(stats, good, strict=True):
        torch.testing.assert_close(ours[1:], expected, rtol=0, atol=1e-12)
    assert stats.query_mean[0].isnan().all()


# -- rows, masks and dtypes -----------------------------------------------------------------------------------------


@every_variant
@centred_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_does_not_count(variant: str, centring: bool, dtype: torch.dtype) -> None:
    q, k = (z.to(dtype) for z in inputs())
    expected = [
        favor_statistics(q[b : b + 1, :, MASK[b]], k[b : b + 1, :, MASK[b]], variant=variant, centring=centring)
        for b in range(2)
    ]
    for z in (q, k):
        z.masked_fill_(~MASK[:, None, :, None], float("nan"))
    stats = favor_statistics(q, k, key_mask=MASK, variant=variant, centring=centring)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-11
    for name, ours in stats._asdict().items():
        theirs = torch.cat([getattr(row, name) for row in expected])
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@every_variant
def test_cross_attention_masks_keys_alone(variant: str) -> None:
    q, k = (torch.randn(1, HEADS, 6, 8, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]]).bool()
    crossed = favor_statistics(q, k, key_mask=mask, is_cross=True, variant=variant)
    shorter = favor_statistics(q, k[:, :, :3], variant=variant)
    for ours, theirs in zip(crossed, shorter, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_variant
def test_half_precision_autocast_and_gradients(variant: str) -> None:
    q, k = (z.float().requires_grad_() for z in inputs())
    plain = favor_statistics(q, k, variant=variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = favor_statistics(q, k, variant=variant)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
    assert not any(s.requires_grad for s in plain)
    for dtype in (torch.float16, torch.bfloat16):
        assert all(s.dtype == torch.float32 for s in favor_statistics(q.to(dtype), k.to(dtype), variant=variant))


@every_variant
def test_statistics_compile_into_one_graph(variant: str) -> None:
    q, k = inputs()
    compiled = torch.compile(
        lambda a, b: tuple(favor_statistics(a, b, key_mask=MASK, variant=variant)), fullgraph=True, backend="aot_eager"
    )
    for ours, expected in zip(compiled(q, k), favor_statistics(q, k, key_mask=MASK, variant=variant), strict=True):
        torch.testing.assert_close(ours, expected)


def test_unknown_variants_are_refused() -> None:
    q, k = inputs()
    with pytest.raises(InputError, match="variant must be one of .*got 'saderff'. Did you mean 'saderf'"):
        favor_statistics(q, k, variant="saderff")
    with pytest.raises(InputError, match="got 'Dense'"):
        FavorMoments.empty(HEADS, DIM).statistics("Dense")


def test_neutral_statistics_change_nothing() -> None:
    x, y = inputs()
    for dense in (False, True):
        for ours, plain in zip(neutral_statistics(HEADS, DIM, dense=dense).transform(x, y), (x, y), strict=True):
            assert torch.equal(ours, plain)
