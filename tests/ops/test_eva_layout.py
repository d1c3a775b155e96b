"""EVA's layouts against a token-by-token reference, on random shapes; limits in which it is softmax."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import naive
import pytest
import torch
from helpers import assert_same, examples, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.functional import eva_attention, softmax_attention

quick = settings(max_examples=examples(60), derandomize=True, database=None)


@functools.cache
def tensors(tokens: int, heads: int = 2, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(batch, heads, tokens, 3, generator=generator, dtype=torch.float64) for _ in range(3))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass
class Case:
    """One call; `chunk` of None cuts by `num_chunks`."""

    tokens: int
    window: int
    num_chunks: int
    chunk: int | None
    chunking: str
    overlap: str | None
    causal: bool
    proposals: str
    weighting: str
    biased: bool
    mapped: bool
    noisy: bool
    num_global: int
    lengths: list[int] | None
    grid: tuple[int, int] | None

    def compare(self) -> None:
        q, k, v = tensors(self.tokens + self.num_global)
        shared: dict[str, Any] = {"num_chunks": self.num_chunks, "chunk_size": self.chunk, "chunking": self.chunking}
        shared |= {"proposals": self.proposals, "weighting": self.weighting, "grid": self.grid}
        ours: dict[str, Any] = {"overlap_window": bool(self.overlap), "overlap_side": self.overlap}
        mask = None
        if self.lengths is not None:
            length = self.tokens + self.num_global
            mask = torch.arange(length) < torch.tensor([min(n, length) for n in self.lengths])[:, None]
            mask[0] = mask[0].flip(0)
        per_head = []
        w, dims = self.window, 1 if self.grid is None else 2
        if self.biased:
            wide = random(2, *[w] * dims, *[3 * w] * dims)
            full = wide.flatten(1, dims).flatten(2)
            stop = {None: 2 * w, "left": 2 * w, "both": 3 * w}[self.overlap]
            seen = slice(w if self.overlap is None else 0, stop)
            wide = wide[..., seen] if dims == 1 else wide[..., seen, seen]
            ours["window_bias"] = wide.flatten(1, dims).flatten(2)
            per_head.append(lambda b, h: {"bias": full[h]})
        if self.mapped:
            matrices, shift, root = random(2, 2, 3, 3, seed=1), random(3, seed=2), 3**-0.25
            for i, name in enumerate(("query_map", "key_map")):
                ours[name] = lambda z, i=i: z @ matrices[i] + shift
                per_head.append(
                    lambda b, h, i=i, name=name: {
                        name: lambda z: torch.matmul(z / root, matrices[i, h]) * root + shift * root
                    }
                )
        if self.noisy:
            noise = random(2, 2, 99, 3, seed=3)
            ours |= {"noise": noise, "noise_scale": self.chunking.replace("exclusive", "corrected")}
            factor = 3**-0.25 if self.chunking == "published" else 1.0
            per_head.append(lambda b, h: {"noise": noise[b, h] * factor})
        result = eva_attention(
            q,
            k,
            v,
            window_size=w,
            is_causal=self.causal,
            key_mask=mask,
            num_global_tokens=self.num_global,
            **shared,
            **ours,
        )
        shared |= {"window": w, "causal": self.causal, "overlap": self.overlap, "num_global": self.num_global}
        assert_same(result, naive.per_row(naive.eva, q, k, v, mask, per_head=per_head, **shared))


@st.composite
def cases(draw: st.DrawFn, kind: str) -> Case:
    causal, is_grid = kind == "causal", kind == "grid"
    chunking = draw(st.sampled_from(["exclusive", "published"]))
    window = draw(st.integers(1, 4 if is_grid else 8))
    overlap = draw(
        st.sampled_from([None, "left"] if causal else [None, "both"] if is_grid else [None, "both", "left"])
    )
    grid = (draw(st.integers(1, 7)), draw(st.integers(1, 7))) if is_grid else None
    if causal:
        options = divisors(window) + ([None] if chunking == "published" else [])
    elif chunking == "exclusive":
        options = [*divisors(window), 2 * window, 3 * window, None, None]
    else:
        options = [1, 2, 3, 5, None, None]
    masked = not is_grid and draw(st.booleans())
    return Case(
        tokens=grid[0] * grid[1] if grid else draw(st.integers(1, 26)),
        window=window,
        num_chunks=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 9, 16, 30])),
        chunk=draw(st.sampled_from(options)),
        chunking=chunking,
        overlap=overlap,
        causal=causal,
        proposals=draw(st.sampled_from(["sum", "mean", "key", "none"])),
        weighting=draw(st.sampled_from(["none", "size", "spread"])),
        biased=draw(st.booleans()),
        mapped=draw(st.booleans()),
        noisy=draw(st.booleans()),
        num_global=0 if causal else draw(st.sampled_from([0, 0, 2])),
        lengths=[draw(st.integers(0, 26)), draw(st.integers(1, 26))] if masked else None,
        grid=grid,
    )


@given(case=cases("sequence"))
@settings(quick, max_examples=examples(150))
def test_layouts_of_sequences(case: Case) -> None:
    # Exclusive chunks that are cut by the window become their other windows, which get no noise.
    case.compare()


@given(case=cases("causal"))
@quick
def test_layouts_of_causal_eva(case: Case) -> None:
    case.compare()


@given(case=cases("grid"))
@quick
def test_layouts_of_images(case: Case) -> None:
    case.compare()


@pytest.mark.parametrize(
    ("is_causal", "side"), [(False, None), (False, "both"), (False, "left"), (True, None), (True, "left")]
)
@pytest.mark.parametrize("masked", [False, True])
def test_single_tokens_and_wide_windows_are_softmax(is_causal: bool, side: str | None, masked: bool) -> None:
    q, k, v = tensors(23)
    mask = torch.arange(23) < torch.tensor([[23], [14]]) if masked else None
    keep = torch.ones(2, 23, dtype=torch.bool) if mask is None else mask
    exact = softmax_attention(q, k, v, key_mask=keep, is_causal=is_causal) * keep[:, None, :, None]
    options = {"overlap_window": bool(side), "overlap_side": side, "is_causal": is_causal, "key_mask": mask}
    for weighting in ("none", "size", "spread"):
        for window in (1, 2, 3, 4, 6):
            given = [{"chunk_size": 1}] if is_causal else [{"chunk_size": 1}, {"num_chunks": 23}]
            for chunks in given:
                assert_same(
                    eva_attention(q, k, v, window_size=window, weighting=weighting, **chunks, **options), exact
                )
        for window in (23, 40):
            layout = {"chunk_size": 1} if is_causal else {"num_chunks": 1}
            assert_same(eva_attention(q, k, v, window_size=window, weighting=weighting, **layout, **options), exact)


def test_single_patches_and_wide_windows_are_softmax() -> None:
    q, k, v = tensors(21)
    exact = softmax_attention(q, k, v)
    for overlap in (False, True):
        options = {"grid": (4, 5), "num_global_tokens": 1, "overlap_window": overlap}
        for window in (1, 2, 3):
            assert_same(eva_attention(q, k, v, window_size=window, num_chunks=25, **options), exact)
        for window in (5, 9):
            assert_same(eva_attention(q, k, v, window_size=window, num_chunks=1, **options), exact)


@pytest.mark.parametrize("weighting", ["size", "spread"])
def test_every_key_counts_once(weighting: str) -> None:
    # With q = k = 0 every key weighs the same: any key counted twice or not at all shows.
    def mean_of(tokens: int, real: int, **options: Any) -> None:
        v = tensors(tokens)[2][:, :1]
        zero = torch.zeros_like(v)
        mask = torch.arange(tokens).expand(2, -1) < torch.tensor([[tokens], [real]])
        ours = eva_attention(zero, zero, v, weighting=weighting, overlap_window=True, key_mask=mask, **options)
        for row, n in zip((0, 1), (tokens, real), strict=True):
            part = v[row, :, :n]
            if options.get("is_causal"):
                expected = part.cumsum(1) / torch.arange(1, n + 1)[:, None]
            else:
                expected = part.mean(1, keepdim=True).expand_as(part)
            torch.testing.assert_close(ours[row, :, :n], expected, rtol=0, atol=1e-13)

    for n, window in itertools.product((1, 2, 7, 16, 26), (1, 2, 3, 6, 8)):
        for side in ("both", "left"):
            for chunks in (1, 2, 5, 64):
                mean_of(n, (n + 1) // 2, window_size=window, num_chunks=chunks, overlap_side=side)
            mean_of(n, (n + 1) // 2, window_size=window, chunk_size=window, overlap_side=side)
            mean_of(n, (n + 1) // 2, window_size=window, chunk_size=3 * window, overlap_side=side)
        for chunk in divisors(window):
            mean_of(n, (n + 1) // 2, window_size=window, chunk_size=chunk, is_causal=True)
    for grid, window in itertools.product(((4, 4), (5, 3), (1, 9), (6, 7), (11, 8)), (1, 2, 3, 4)):
        for chunks in (1, 4, 9, 64):
            n = grid[0] * grid[1]
            mean_of(n, n, window_size=window, num_chunks=chunks, grid=grid)


def test_published_tokens_are_never_lost() -> None:
    # Every token is in as many chunks as its neighbours: the sum of the chunks' means counts all of them.
    for n, num_chunks, window in itertools.product((5, 26, 29), (3, 7, 40), (2, 4)):
        q, _, _ = tensors(n)
        probe = torch.zeros_like(q, requires_grad=True)
        seen = []
        eva_attention(
            q,
            probe,
            q,
            window_size=window,
            num_chunks=num_chunks,
            chunking="published",
            weighting="none",
            proposals="key",
            key_map=lambda z, seen=seen: seen.append(z) or z,
        )
        counted = torch.autograd.grad(seen[0].sum(), probe)[0]
        torch.testing.assert_close(counted, torch.full_like(counted, float(counted.max())), rtol=1e-12, atol=0)
        assert counted.min() > 0
