"""LARA with landmarks against row-by-row references, for every layout."""

from __future__ import annotations

import naive
import pytest
import torch
from helpers import MASKS, assert_same, inputs, random
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import lara_attention, softmax_attention
from hf_linattn.ops.lara.attention import IMPORTANCE_WEIGHTINGS

both_roads = pytest.mark.usefixtures("road")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weighting", IMPORTANCE_WEIGHTINGS)
@pytest.mark.parametrize("landmarks", [1, 5, 8, 23, 64])
def test_lara_on_sequences(mask: str, weighting: str, landmarks: int) -> None:
    q, k, v = inputs()
    ours = lara_attention(q, k, v, num_landmarks=landmarks, weighting=weighting, key_mask=MASKS[mask])
    assert_same(ours, naive.per_row(naive.lara, q, k, v, MASKS[mask], landmarks=landmarks, weighting=weighting))


@both_roads
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weighting", IMPORTANCE_WEIGHTINGS)
@pytest.mark.parametrize(("window", "count"), [(3, 0), (8, 0), (64, 0), (0, 2), (3, 2), (0, 23), (4, 23)])
def test_windows_and_global_tokens(mask: str, weighting: str, window: int, count: int) -> None:
    q, k, v = inputs()
    options = {"weighting": weighting}
    ours = lara_attention(
        q, k, v, num_landmarks=5, key_mask=MASKS[mask], window_size=window, num_global_tokens=count, **options
    )
    expected = naive.per_row(naive.lara, q, k, v, MASKS[mask], landmarks=5, window=window, num_global=count, **options)
    assert_same(ours, expected)


@both_roads
@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 7), (7, 2)])
@pytest.mark.parametrize("landmarks", [1, 4, 10, 36])
@pytest.mark.parametrize(("window", "count"), [(0, 0), (2, 0), (3, 1), (9, 0)])
def test_lara_on_images(grid: tuple[int, int], landmarks: int, window: int, count: int) -> None:
    q, k, v = inputs(grid[0] * grid[1] + count)
    for weighting in IMPORTANCE_WEIGHTINGS:
        options = {"grid": grid, "weighting": weighting}
        ours = lara_attention(q, k, v, num_landmarks=landmarks, window_size=window, num_global_tokens=count, **options)
        expected = naive.per_row(naive.lara, q, k, v, landmarks=landmarks, window=window, num_global=count, **options)
        assert_same(ours, expected)


@both_roads
@pytest.mark.parametrize("mask", ["none", "right", "left"])
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("weighting", IMPORTANCE_WEIGHTINGS)
def test_noise_maps_and_offset(mask: str, window: int, weighting: str) -> None:
    q, k, v = inputs()
    noise, query_map, key_map = random(2, 2, 6, 4, seed=7), random(2, 4, 4, seed=7), random(2, 4, 4, seed=7) * 0.5
    offset = torch.tensor([0.7, -1.3]).double()
    maps = {"query_map": lambda z: z @ query_map, "key_map": lambda z: z @ key_map}
    for draw in (noise, None):
        ours = lara_attention(
            q,
            k,
            v,
            num_landmarks=6,
            key_mask=MASKS[mask],
            window_size=window,
            weighting=weighting,
            noise=False if draw is None else draw,
            offset=offset,
            **maps,
        )

        def of_head(b: int, h: int, draw: Tensor | None = draw) -> dict:
            maps = {"query_map": query_map[h], "key_map": key_map[h], "offset": float(offset[h])}
            return {**maps, "noise": None if draw is None else draw[b, h]}

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


@both_roads
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
    for name in ("mixing", "map_stage", "noise_scale"):
        with pytest.raises(InputError, match=f"{name} must be one of.*'key-value'"):
            lara_attention(q, k, v, **{name: "key-value"})
    with pytest.raises(InputError, match="samples_per_landmark.*0"):
        lara_attention(q, k, v, samples_per_landmark=0)
    with pytest.raises(InputError, match="chunk_size.*3"):
        lara_attention(q, k, v, chunk_size=3)
    with pytest.raises(InputError, match=r"noise must be .*\(2, 2, 10, 4\); got \(2, 2, 5, 4\)"):
        lara_attention(q, k, v, num_landmarks=5, samples_per_landmark=2, noise=random(2, 2, 5, 4, seed=7))
