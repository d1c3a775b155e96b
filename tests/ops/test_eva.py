"""EVA against a query-by-query reference, for every layout of windows and chunks."""

from __future__ import annotations

import naive
import pytest
import torch
from helpers import MASKS, assert_same, inputs, random
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import eva_attention, softmax_attention
from hf_linattn.ops.eva.exclusive import chunk_length

# window, chunks: chunks inside a window, equal to it, larger (sibling windows), one for everything
LAYOUTS = [(1, 64), (1, 3), (2, 5), (3, 8), (4, 6), (6, 64), (8, 3), (8, 4), (4, 1), (3, 2), (2, 1), (23, 4), (64, 2)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("window", "chunks"), LAYOUTS)
def test_eva_on_sequences(mask: str, window: int, chunks: int) -> None:
    q, k, v = inputs()
    weighting = "spread" if (window + chunks) % 2 else "size"
    ours = eva_attention(q, k, v, window_size=window, num_chunks=chunks, key_mask=MASKS[mask], weighting=weighting)
    assert_same(
        ours, naive.per_row(naive.eva, q, k, v, MASKS[mask], window=window, num_chunks=chunks, weighting=weighting)
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("window", "chunk"), [(1, 1), (3, 1), (4, 2), (6, 3), (8, 8), (8, 4), (24, 4)])
@pytest.mark.parametrize("proposals", ["sum", "mean", "key", "none"])
def test_causal_eva(mask: str, window: int, chunk: int, proposals: str) -> None:
    q, k, v = inputs()
    for weighting in ("size", "spread"):
        options = {"chunk_size": chunk, "proposals": proposals, "weighting": weighting}
        ours = eva_attention(q, k, v, window_size=window, is_causal=True, key_mask=MASKS[mask], **options)
        assert_same(ours, naive.per_row(naive.eva, q, k, v, MASKS[mask], window=window, causal=True, **options))


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 7), (7, 5)])
@pytest.mark.parametrize(("window", "chunks"), [(1, 4), (2, 64), (2, 9), (3, 4), (2, 4), (2, 1), (4, 30), (9, 4)])
@pytest.mark.parametrize("count", [0, 1])
def test_eva_on_images(grid: tuple[int, int], window: int, chunks: int, count: int) -> None:
    q, k, v = inputs(grid[0] * grid[1] + count)
    weighting = "spread" if count else "size"
    options = {"grid": grid, "num_chunks": chunks, "weighting": weighting}
    ours = eva_attention(q, k, v, window_size=window, num_global_tokens=count, **options)
    assert_same(ours, naive.per_row(naive.eva, q, k, v, window=window, num_global=count, **options))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("window", "chunks", "count"), [(3, 4, 2), (2, 2, 1), (4, 64, 3), (4, 3, 23)])
def test_global_tokens(mask: str, window: int, chunks: int, count: int) -> None:
    q, k, v = inputs()
    options = {"num_chunks": chunks, "proposals": "sum" if count % 2 else "key"}
    ours = eva_attention(q, k, v, window_size=window, num_global_tokens=count, key_mask=MASKS[mask], **options)
    assert_same(ours, naive.per_row(naive.eva, q, k, v, MASKS[mask], window=window, num_global=count, **options))


@pytest.mark.parametrize("mask", ["none", "right", "left"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("proposals", ["sum", "mean", "key", "none"])
def test_noise_and_maps(mask: str, is_causal: bool, proposals: str) -> None:
    q, k, v = inputs()
    query_map, key_map = random(2, 4, 4, seed=7), random(2, 4, 4, seed=7) * 0.5
    chunks = 10 if is_causal else 6
    noise = random(2, 2, chunks, 4, seed=7)
    maps = {"query_map": lambda z: z @ query_map, "key_map": lambda z: z @ key_map}
    options = {"num_chunks": 6, "chunk_size": 2 if is_causal else None, "proposals": proposals}
    for given in (False, noise):
        ours = eva_attention(
            q, k, v, window_size=4, is_causal=is_causal, key_mask=MASKS[mask], noise=given, **options, **maps
        )

        def of_head(b: int, h: int, given: Tensor | bool = given) -> dict:
            maps = {"query_map": lambda z: z @ query_map[h], "key_map": lambda z: z @ key_map[h]}
            return {**maps, "noise": None if given is False else torch.cat([given[b, h], torch.zeros(9, 4).double()])}

        expected = naive.per_row(
            naive.eva, q, k, v, MASKS[mask], window=4, causal=is_causal, per_head=[of_head], **options
        )
        assert_same(ours, expected)


def test_noise_drawn_inside() -> None:
    q, k, v = inputs()
    torch.manual_seed(0)
    for chunks in (8, 2):  # two chunks are larger than the window: the sibling windows get noise as well
        first, second = (eva_attention(q, k, v, window_size=2, num_chunks=chunks, noise=True) for _ in range(2))
        assert (first - second).abs().amax(-1).min() > 0
    noise = random(2, 2, 8, 4, seed=7)
    spread = [eva_attention(q, k, v, window_size=3, num_chunks=8, noise=noise * c) for c in (0.0, 1.0)]
    assert_same(spread[0], eva_attention(q, k, v, window_size=3, num_chunks=8))
    assert not torch.allclose(spread[0], spread[1])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "left", "holes"])
def test_chunks_of_one_token_and_wide_windows_are_softmax(is_causal: bool, mask: str) -> None:
    q, k, v = inputs()
    keep = torch.ones(2, 23, dtype=torch.bool) if MASKS[mask] is None else MASKS[mask]
    exact = softmax_attention(q, k, v, key_mask=keep, is_causal=is_causal) * keep[:, None, :, None]
    options = {"is_causal": is_causal, "key_mask": MASKS[mask]}
    for weighting in ("size", "spread"):
        for window in (1, 4):
            ours = eva_attention(
                q, k, v, window_size=window, num_chunks=23, chunk_size=1, weighting=weighting, **options
            )
            assert_same(ours, exact)
        assert_same(eva_attention(q, k, v, window_size=24, num_chunks=1, weighting=weighting, **options), exact)


def test_single_token_chunks_of_an_image_are_softmax() -> None:
    q, k, v = inputs(21)
    for window in (1, 2, 5):
        ours = eva_attention(q, k, v, window_size=window, num_chunks=25, grid=(4, 5), num_global_tokens=1)
        assert_same(ours, softmax_attention(q, k, v))


@pytest.mark.parametrize("weighting", ["size", "spread"])
def test_uniform_attention_is_the_exact_mean(weighting: str) -> None:
    # With q = k = 0 every key weighs the same: any key counted twice or not at all shows.
    def mean_of(v: Tensor, **options: object) -> None:
        zero = torch.zeros(1, 1, v.shape[2], 3, dtype=torch.float64)
        ours = eva_attention(zero, zero, v, weighting=weighting, **options)
        if options.get("is_causal"):
            expected = v.cumsum(2) / torch.arange(1, v.shape[2] + 1)[:, None]
        else:
            expected = v.mean(2, keepdim=True).expand_as(v)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)

    for n in (1, 2, 7, 16, 23):
        v = inputs(n)[2][:1, :1]
        for window in (1, 2, 3, 8):
            for chunks in (1, 2, 5, 64):
                mean_of(v, window_size=window, num_chunks=chunks)
            for chunk in (c for c in (1, 2, 3, 4, 8) if window % c == 0):
                mean_of(v, window_size=window, chunk_size=chunk, is_causal=True)
    for grid in ((4, 4), (5, 3), (1, 9), (6, 7)):
        v = inputs(grid[0] * grid[1])[2][:1, :1]
        for window in (1, 2, 4):
            for chunks in (1, 4, 16, 64):
                mean_of(v, window_size=window, num_chunks=chunks, grid=grid)


def test_chunk_length_is_the_shortest_that_fits() -> None:
    tokens = torch.arange(1, 70)
    for window in (1, 2, 3, 4, 6, 8, 12, 32):
        for chunks in (1, 2, 3, 7, 8, 16, 64):
            ours = chunk_length(window, chunks, tokens).tolist()
            assert ours == [naive.chunk_side(window, chunks, n) for n in tokens.tolist()]


@pytest.mark.parametrize("queries", [1, 6, 16])
@pytest.mark.parametrize("mask", ["none", "left", "right"])
def test_the_last_queries_of_a_causal_layer(queries: int, mask: str) -> None:
    q, k, v = inputs()
    options = {"key_mask": MASKS[mask], "is_causal": True, "window_size": 4, "chunk_size": 2, "proposals": "key"}
    full = eva_attention(q, k, v, **options)
    last = eva_attention(q[:, :, -queries:], k, v, **options)
    torch.testing.assert_close(last, full[:, :, -queries:], rtol=0, atol=1e-13)


def test_a_prefix_gives_what_it_gives_inside_a_longer_sequence() -> None:
    q, k, v = inputs()
    options = {"is_causal": True, "window_size": 4, "chunk_size": 2}
    full = eva_attention(q, k, v, **options)
    for n in range(1, 23):
        assert_same(eva_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], **options), full[:, :, :n])


def test_layouts_first_seen_without_autograd_serve_training() -> None:
    q, k, v = inputs(33)
    options = {"window_size": 2, "num_chunks": 3, "grid": (3, 11)}
    with torch.inference_mode():
        before = eva_attention(q, k, v, **options)
    q, k, v = (z.clone().requires_grad_() for z in (q, k, v))
    after = eva_attention(q, k, v, **options)
    after.sum().backward()
    torch.testing.assert_close(after, before.clone(), rtol=0, atol=0)
    assert q.grad.isfinite().all()


def test_wrong_inputs_are_refused() -> None:
    q, k, v = inputs()
    for change in ({"window_size": 0}, {"num_chunks": 0}, {"weighting": "mass"}):
        with pytest.raises(InputError, match="got"):
            eva_attention(q, k, v, **change)
    for chunk in (0, 3):
        with pytest.raises(InputError, match="chunk_size must"):
            eva_attention(q, k, v, window_size=8, chunk_size=chunk, is_causal=True)
    with pytest.raises(InputError, match="proposals='key'"):
        eva_attention(q[:, :, -1:], k, v, window_size=8, is_causal=True)
    with pytest.raises(InputError, match="same tokens"):
        eva_attention(q[:, :, -1:], k, v, window_size=8)
    with pytest.raises(UnsupportedError, match="Global tokens"):
        eva_attention(q, k, v, window_size=8, is_causal=True, num_global_tokens=1)
