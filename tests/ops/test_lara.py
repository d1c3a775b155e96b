"""LARA and RA against row-by-row references, for every layout."""

from __future__ import annotations

import naive
import pytest
import torch
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import lara_attention, randomized_attention, softmax_attention

MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 23, [1] * 15 + [0] * 8]).bool(),
    "left": torch.tensor([[0] * 19 + [1] * 4, [1] * 23]).bool(),
    "holes": torch.tensor([[1, 0, 1] * 7 + [1, 1], [0, 0] + [1] * 10 + [0] * 11]).bool(),
    "all": torch.tensor([[0] * 23, [1] * 23]).bool(),
    "one": torch.tensor([[0] * 22 + [1], [1] * 23]).bool(),
}


def inputs(tokens: int = 23, dim: int = 4, batch: int = 2, heads: int = 2, scale: float = 1.2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + dim)
    return [torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64) * scale for _ in range(3)]


def standard_normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weighting", ["balance", "optimal"])
@pytest.mark.parametrize("landmarks", [1, 5, 8, 23, 64])
def test_sequences(mask: str, weighting: str, landmarks: int) -> None:
    q, k, v = inputs()
    ours = lara_attention(q, k, v, num_landmarks=landmarks, weighting=weighting, key_mask=MASKS[mask])
    assert_same(ours, naive.per_row(naive.lara, q, k, v, MASKS[mask], landmarks=landmarks, weighting=weighting))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weighting", ["balance", "optimal"])
@pytest.mark.parametrize(("window", "count"), [(3, 0), (8, 0), (64, 0), (0, 2), (3, 2), (0, 23), (4, 23)])
def test_windows_and_global_tokens(mask: str, weighting: str, window: int, count: int) -> None:
    q, k, v = inputs()
    options = {"weighting": weighting}
    ours = lara_attention(
        q, k, v, num_landmarks=5, key_mask=MASKS[mask], window_size=window, num_global_tokens=count, **options
    )
    expected = naive.per_row(naive.lara, q, k, v, MASKS[mask], landmarks=5, window=window, num_global=count, **options)
    assert_same(ours, expected)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 7), (7, 2)])
@pytest.mark.parametrize("landmarks", [1, 4, 10, 36])
@pytest.mark.parametrize(("window", "count"), [(0, 0), (2, 0), (3, 1), (9, 0)])
def test_images(grid: tuple[int, int], landmarks: int, window: int, count: int) -> None:
    q, k, v = inputs(grid[0] * grid[1] + count)
    for weighting in ("balance", "optimal"):
        options = {"grid": grid, "weighting": weighting}
        ours = lara_attention(q, k, v, num_landmarks=landmarks, window_size=window, num_global_tokens=count, **options)
        expected = naive.per_row(naive.lara, q, k, v, landmarks=landmarks, window=window, num_global=count, **options)
        assert_same(ours, expected)


@pytest.mark.parametrize("mask", ["none", "right", "left"])
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("weighting", ["balance", "optimal"])
def test_noise_maps_and_offset(mask: str, window: int, weighting: str) -> None:
    q, k, v = inputs()
    noise, query_map, key_map = standard_normal(2, 2, 6, 4), standard_normal(2, 4, 4), standard_normal(2, 4, 4) * 0.5
    offset = torch.tensor([0.7, -1.3]).double()
    maps = {"query_map": lambda z: z @ query_map, "key_map": lambda z: z @ key_map}
    for given in (noise, None):
        ours = lara_attention(
            q,
            k,
            v,
            num_landmarks=6,
            key_mask=MASKS[mask],
            window_size=window,
            weighting=weighting,
            noise=False if given is None else given,
            offset=offset,
            **maps,
        )

        def of_head(b: int, h: int, given: Tensor | None = given) -> dict:
            maps = {"query_map": query_map[h], "key_map": key_map[h], "offset": float(offset[h])}
            return {**maps, "noise": None if given is None else given[b, h]}

        expected = naive.per_row(
            naive.lara, q, k, v, MASKS[mask], landmarks=6, window=window, weighting=weighting, per_head=[of_head]
        )
        assert_same(ours, expected)
    per_row = lara_attention(q, k, v, window_size=8, offset=offset.view(1, 2, 1, 1).expand(2, -1, -1, -1))
    assert_same(per_row, lara_attention(q, k, v, window_size=8, offset=offset))


def test_a_window_over_everything_is_softmax() -> None:
    q, k, v = inputs()
    for mask in ("none", "left", "holes"):
        exact = softmax_attention(q, k, v, key_mask=MASKS[mask])
        exact = exact if MASKS[mask] is None else exact * MASKS[mask][:, None, :, None]
        assert_same(lara_attention(q, k, v, window_size=23, key_mask=MASKS[mask]), exact)
    assert_same(lara_attention(q[:, :, :20], k[:, :, :20], v[:, :, :20], window_size=5, grid=(4, 5)), exact_of(20))


def exact_of(tokens: int) -> Tensor:
    q, k, v = (z[:, :, :tokens] for z in inputs())
    return softmax_attention(q, k, v)


def test_the_slots_are_on_the_scale_of_the_window() -> None:
    # Evaluated at the means, the slots' mass would be many nats too small; the correction makes it right on average.
    q, k, v = inputs(64, 8, scale=0.5)
    exact = softmax_attention(q, k, v)

    def error(offset: float) -> float:
        ours = lara_attention(q, k, v, num_landmarks=16, window_size=8, offset=torch.full((2,), offset))
        return float((ours - exact).norm() / exact.norm())

    assert all(error(0.0) < 0.85 * error(offset) for offset in (-3.0, -1.0, 1.0, 3.0))


def test_noise_drawn_inside_averages_towards_softmax() -> None:
    q, k, v = (z[:1, :1] * 0.6 for z in inputs(9))
    exact = softmax_attention(q, k, v)[0]
    torch.manual_seed(0)
    draws = lara_attention(*(z.expand(4000, -1, -1, -1) for z in (q, k, v)), num_landmarks=9, noise=True)
    assert draws.std(0).mean() > 0.05
    without = lara_attention(q, k, v, num_landmarks=9)[0]
    assert (draws.mean(0) - exact).norm() < 0.5 * (without - exact).norm()


@pytest.mark.parametrize("proposal", ["softmax_mean", "mean"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
def test_randomized_attention(proposal: str, is_causal: bool, mask: str) -> None:
    q, k, v = inputs()
    noise, key_mask = standard_normal(2, 2, 23, 4), MASKS[mask]
    options = {"key_mask": key_mask, "is_causal": is_causal, "proposal": proposal}
    ours = randomized_attention(q, k, v, noise=noise, **options)

    def of_head(b: int, h: int) -> dict:
        return {"noise": noise[b, h] if key_mask is None else noise[b, h][key_mask[b]]}

    expected = naive.per_row(
        naive.randomized, q, k, v, key_mask, per_head=[of_head], proposal=proposal, causal=is_causal
    )
    keep = torch.ones(2, 23, dtype=torch.bool) if key_mask is None else key_mask
    assert_same(ours * keep[:, None, :, None], expected)
    assert_same(randomized_attention(q, k, v, **options), randomized_attention(q, k, v, noise=noise * 0, **options))


def test_randomized_attention_averages_to_softmax() -> None:
    # One sample per query is unbiased: the density of its draw is the query's own.
    q, k, v = (z[:1, :1] for z in inputs(6))
    torch.manual_seed(0)
    draws = randomized_attention(
        *(z.expand(20_000, -1, -1, -1) for z in (q, k, v)), proposal="softmax_mean", noise=True
    )
    exact = softmax_attention(q, k, v)
    assert (draws.mean(0) - exact[0]).norm() / exact.norm() < 0.1
    assert draws.std(0).min() > 0.05


def test_wrong_inputs_are_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(UnsupportedError, match="no causal form.*favor_plus"):
        lara_attention(q, k, v, is_causal=True)
    with pytest.raises(InputError, match="weighting.*'size'"):
        lara_attention(q, k, v, weighting="size")
    with pytest.raises(InputError, match="num_landmarks.*0"):
        lara_attention(q, k, v, num_landmarks=0)
    with pytest.raises(InputError, match="same tokens"):
        lara_attention(q[:, :, :5], k, v)
    with pytest.raises(InputError, match="grid of 3 x 7"):
        lara_attention(q, k, v, grid=(3, 7))
    with pytest.raises(InputError, match="proposal"):
        randomized_attention(q, k, v, proposal="key")
