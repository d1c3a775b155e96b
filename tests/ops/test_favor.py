"""FAVOR+ and FAVOR# attention against the dense log-space kernel, for every layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import MASKS, inputs
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import (
    FavorStatistics,
    draw_projection,
    favor_attention,
    favor_log_features,
    favor_statistics,
    softmax_attention,
)
from hf_linattn.ops import dense_slots
from hf_linattn.ops.favor.statistics import FAVOR_VARIANTS
from hf_linattn.ops.reference import favor_reference

both_roads = pytest.mark.usefixtures("road")


def directions(features: int = 10, dim: int = 4, heads: int = 2, seed: int = 0) -> Tensor:
    return draw_projection(heads, features, dim, seed=seed).double()


def statistics(kind: str, q: Tensor, k: Tensor, mask: Tensor | None, centring: bool = True) -> FavorStatistics | None:
    if kind == "none":
        return None
    # As plain constants: a causal function would refuse those of its own row.
    return FavorStatistics(*favor_statistics(q, k, key_mask=mask, variant=kind, centring=centring))


@both_roads
@pytest.mark.parametrize("kind", ["none", "gerf", "saderf", "dense"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3, 8, 64])
def test_favor_on_sequences(kind: str, mask: str, is_causal: bool, window: int) -> None:
    q, k, v = inputs()
    w, key_mask = directions(), MASKS[mask]
    stats = statistics(kind, q, k, key_mask)
    expected = favor_reference(
        q, k, v, w, statistics=stats, key_mask=key_mask, is_causal=is_causal, window_size=window
    )
    for chunk_size in (None, 1, 2, 8, 64):
        ours = favor_attention(
            q,
            k,
            v,
            w,
            key_mask=key_mask,
            is_causal=is_causal,
            statistics=stats,
            window_size=window,
            chunk_size=chunk_size,
        )
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["none", "saderf"])
@pytest.mark.parametrize("window", [0, 3, 8])
@pytest.mark.parametrize("count", [1, 3, 23])
@pytest.mark.parametrize("mask", ["none", "right", "left", "all"])
def test_global_tokens(kind: str, window: int, count: int, mask: str) -> None:
    q, k, v = inputs()
    w, key_mask = directions(), MASKS[mask]
    stats = statistics(kind, q, k, key_mask)
    ours = favor_attention(
        q, k, v, w, key_mask=key_mask, statistics=stats, window_size=window, num_global_tokens=count, chunk_size=8
    )
    expected = favor_reference(
        q, k, v, w, statistics=stats, key_mask=key_mask, window_size=window, num_global_tokens=count
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@both_roads
@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 7), (7, 1)])
@pytest.mark.parametrize("window", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("count", [0, 1])
def test_favor_on_images(grid: tuple[int, int], window: int, count: int) -> None:
    q, k, v = inputs(grid[0] * grid[1] + count)
    w = directions()
    stats = statistics("saderf", q, k, None)
    expected = favor_reference(q, k, v, w, statistics=stats, window_size=window, grid=grid, num_global_tokens=count)
    for chunk_size in (None, 1, 16, 64):
        ours = favor_attention(
            q, k, v, w, statistics=stats, window_size=window, grid=grid, num_global_tokens=count, chunk_size=chunk_size
        )
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@both_roads
@pytest.mark.parametrize("variant", FAVOR_VARIANTS)
@pytest.mark.parametrize("centring", [False, True])
def test_every_variant_with_and_without_centring(variant: str, centring: bool) -> None:
    q, k, v = inputs()
    q, k = q + 1, k - 0.5
    stats = favor_statistics(q, k, variant=variant, centring=centring)
    assert bool((stats.query_mean != 0).all()) is centring
    for window in (0, 8):
        ours = favor_attention(q, k, v, directions(), statistics=stats, window_size=window)
        torch.testing.assert_close(
            ours, favor_reference(q, k, v, directions(), statistics=stats, window_size=window), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 4])
def test_many_blocks_take_the_scan(is_causal: bool, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(61)
    dense = favor_attention(q, k, v, directions(), is_causal=is_causal, window_size=window, chunk_size=4)
    monkeypatch.setattr(dense_slots, "_DENSE_BLOCKS", 0)
    scan = favor_attention(q, k, v, directions(), is_causal=is_causal, window_size=window, chunk_size=4)
    torch.testing.assert_close(scan, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        scan, favor_reference(q, k, v, directions(), is_causal=is_causal, window_size=window), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("position", [0, 5, 11, 22])
def test_a_huge_key_does_not_starve_earlier_queries(position: int) -> None:
    # In float32, chunks that share one maximum over the keys would lose the queries before it.
    q, k, v = inputs()
    k[:, :, position] *= 60
    w = directions()
    expected = favor_reference(q, k, v, w, is_causal=True)
    for chunk_size in (None, 1, 4, 64):
        ours = favor_attention(q.float(), k.float(), v.float(), w, is_causal=True, chunk_size=chunk_size)
        torch.testing.assert_close(ours, expected.float(), rtol=1e-2, atol=1e-2)
        before = slice(0, position)
        torch.testing.assert_close(ours[:, :, before], expected.float()[:, :, before], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", *FAVOR_VARIANTS])
@pytest.mark.parametrize(("queries", "keys"), [(3, 9), (9, 3), (1, 5)])
def test_cross_attention(kind: str, queries: int, keys: int) -> None:
    q, k, v = inputs(queries)[0], *inputs(keys)[1:]
    w = directions()
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[1, 1:] = False
    stats = statistics(kind, q, k, None)
    for key_mask in (None, mask):
        ours = favor_attention(q, k, v, w, key_mask=key_mask, statistics=stats)
        a, c = favor_log_features(q * 4**-0.25, k * 4**-0.25, w, stats)
        weights = (a.unsqueeze(-2) + c.unsqueeze(-3)).logsumexp(-1)
        weights = weights if key_mask is None else weights.masked_fill(~key_mask[:, None, None], float("-inf"))
        torch.testing.assert_close(ours, weights.softmax(-1) @ v, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("queries", [1, 6, 16])
@pytest.mark.parametrize("mask", ["none", "left", "right"])
def test_the_last_queries_of_a_causal_layer(window: int, queries: int, mask: str) -> None:
    q, k, v = inputs()
    options = {"key_mask": MASKS[mask], "is_causal": True, "window_size": window, "chunk_size": 8}
    full = favor_attention(q, k, v, directions(), **options)
    last = favor_attention(q[:, :, -queries:], k, v, directions(), **options)
    torch.testing.assert_close(last, full[:, :, -queries:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_over_everything_is_softmax(is_causal: bool) -> None:
    q, k, v = inputs()
    for window in (23, 24, 100):
        ours = favor_attention(q, k, v, directions(), is_causal=is_causal, window_size=window)
        torch.testing.assert_close(ours, softmax_attention(q, k, v, is_causal=is_causal), rtol=0, atol=1e-12)


@both_roads
def test_scaling_projection_and_value_shapes() -> None:
    q, k, _ = inputs()
    v = torch.randn(2, 2, 23, 7, dtype=torch.float64)
    shared = directions()[0]
    for window, is_causal in itertools.product((0, 4), (False, True)):
        options = {"window_size": window, "is_causal": is_causal}
        ours = favor_attention(q, k, v, shared, scaling=0.2, **options)
        unit = favor_attention(q * 0.2**0.5, k * 0.2**0.5, v, shared.expand(2, -1, -1), scaling=1.0, **options)
        torch.testing.assert_close(ours, unit, rtol=0, atol=1e-12)
        parts = [favor_attention(q, k, z, shared, scaling=0.2, **options) for z in v.split([4, 3], -1)]
        torch.testing.assert_close(ours, torch.cat(parts, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"projection": torch.zeros(3, 5, 4)}, InputError),
        ({"projection": torch.zeros(5, 3)}, InputError),
        ({"chunk_size": 12}, InputError),
        ({"chunk_size": 0}, InputError),
        ({"scaling": 0.0}, InputError),
        ({"key": torch.zeros(2, 2, 9, 4).double()}, InputError),  # not the length of the values
        ({"key_mask": torch.ones(2, 23)}, InputError),
        ({"key_mask": torch.ones(2, 22, dtype=torch.bool)}, InputError),
        ({"grid": (4, 6), "window_size": 2}, InputError),
        ({"is_causal": True, "num_global_tokens": 1}, UnsupportedError),
        ({"is_causal": True, "grid": (23, 1)}, UnsupportedError),
        ({"query": torch.zeros(2, 2, 9, 4).double(), "window_size": 2}, InputError),
        ({"query": torch.zeros(2, 2, 29, 4).double(), "is_causal": True}, InputError),
    ],
)
def test_wrong_inputs_are_refused(change: dict, error: type[Exception]) -> None:
    q, k, v = inputs()
    with pytest.raises(error, match="got|Set it to 0"):
        favor_attention(**{"query": q, "key": k, "value": v, "projection": directions(), **change})


@both_roads
def test_a_masked_grid_is_refused() -> None:
    q, k, v = inputs()
    mask = torch.ones(2, 23, dtype=torch.bool)
    options = {"window_size": 2, "grid": (2, 11), "num_global_tokens": 1}
    favor_attention(q, k, v, directions(), key_mask=mask, **options)
    mask[0, 5] = False
    with pytest.raises(InputError, match="masked patches"):
        favor_attention(q, k, v, directions(), key_mask=mask, **options)


@both_roads
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("chunk_size", [None, 1, 8, 64])
def test_dropout_of_slots_reaches_every_query_and_keeps_the_mean(
    is_causal: bool, window: int, chunk_size: int
) -> None:
    q, k, v = (z[:1, :1] for z in inputs(12, scale=0.7))
    options = {"is_causal": is_causal, "window_size": window, "chunk_size": chunk_size}
    plain = favor_attention(q, k, v, directions()[:1], **options)[0]
    torch.manual_seed(0)
    many = [z.expand(3000, -1, -1, -1) for z in (q, k, v)]
    draws = favor_attention(*many, directions()[:1], slot_dropout=0.3, **options)
    reads_slots = slice(window if is_causal else 0, None)  # the first window of a causal layer has nothing before it
    assert draws.std(0)[:, reads_slots].min() > 1e-3
    error = (draws.mean(0) - plain)[:, reads_slots] / (draws.std(0)[:, reads_slots] / 3000**0.5)
    assert error.abs().max() < 5


def test_cross_attention_of_equal_lengths_has_to_be_named() -> None:
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    projection = draw_projection(2, 12, 8, seed=0).double()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]]).bool()
    crossed = favor_attention(q, k, v, projection, key_mask=mask, is_cross=True)
    longer = favor_attention(q, k[:, :, :3], v[:, :, :3], projection)
    torch.testing.assert_close(crossed, longer)
    assert not favor_attention(q, k, v, projection, key_mask=mask)[:, :, 3:].any()
    with pytest.raises(InputError, match="is_cross"):
        favor_attention(q, k, v, projection, is_cross=True, window_size=2)
