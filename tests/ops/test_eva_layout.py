"""EVA's layouts and options against a token-by-token reference, on random shapes; limits in which it is softmax."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import naive
import pytest
import torch
from helpers import assert_same, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import eva_attention, softmax_attention
from hf_linattn.ops.eva.published import _most_chunks

quick = settings(max_examples=60, derandomize=True, database=None)


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
@settings(quick, max_examples=150)
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


@pytest.mark.parametrize("chunking", ["exclusive", "published"])
@pytest.mark.parametrize("overlap", [False, True])
def test_later_tokens_have_no_gradient(chunking: str, overlap: bool) -> None:
    for n in (9, 20):
        inputs = [z.clone().requires_grad_() for z in tensors(n)]
        bias = random(1, 4, 8 if overlap else 4)
        out = eva_attention(
            *inputs,
            window_size=4,
            chunk_size=2,
            is_causal=True,
            chunking=chunking,
            overlap_window=overlap,
            window_bias=bias,
        )
        for t in range(n - 1):
            for grad in torch.autograd.grad(out[:, :, : t + 1].sin().sum(), inputs, retain_graph=True):
                assert (grad[:, :, t + 1 :] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunking", ["exclusive", "published"])
def test_gradients_of_every_layout(is_causal: bool, masked: bool, overlap: bool, chunking: str) -> None:
    inputs = [z[:1, :1, :, :2].clone().requires_grad_() for z in tensors(7)]
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1]]).bool() if masked else None
    reach = (2 if is_causal else 4) if overlap else 0
    bias = random(1, 2, 2 + reach).requires_grad_()
    options = {"window_size": 2, "is_causal": is_causal, "key_mask": mask, "overlap_window": overlap}
    options |= {"chunk_size": 2} if is_causal else {"num_chunks": 2}

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return eva_attention(q, k, v, window_bias=bias, chunking=chunking, weighting="spread", **options)

    if chunking == "published" and not is_causal and overlap:
        bias = random(1, 2, 4).requires_grad_()
    torch.autograd.gradcheck(run, (*inputs, bias), fast_mode=True)


def test_gradients_in_images() -> None:
    inputs = [z[:1, :1, :, :2].clone().requires_grad_() for z in tensors(12)]
    for chunking, slots in (("exclusive", 6), ("published", 4)):
        bias = random(1, 4, slots**2).requires_grad_()
        options = {"window_size": 2, "num_chunks": 4, "grid": (4, 3), "overlap_window": True, "chunking": chunking}
        torch.autograd.gradcheck(
            lambda q, k, v, bias, options=options: eva_attention(q, k, v, window_bias=bias, **options),
            (*inputs, bias),
            fast_mode=True,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunking", ["exclusive", "published"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_layouts_in_half_precision(dtype: torch.dtype, chunking: str, is_causal: bool, scale: float) -> None:
    q, k, v = tensors(21)
    given = [(q * scale).to(dtype), (k * scale).to(dtype), v.to(dtype)]
    bias = random(2, 4, 8 if is_causal or chunking == "published" else 12)
    options = {"window_size": 4, "overlap_window": True, "chunking": chunking, "is_causal": is_causal}
    options |= {"chunk_size": 2 if is_causal else None, "num_chunks": 4, "window_bias": bias}
    exact, plain, half = (
        eva_attention(*(z.to(t) for z in given), **options) for t in (torch.float64, torch.float32, dtype)
    )
    assert half.isfinite().all()
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (half - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding


def test_the_published_layout_pads_every_row_for_itself() -> None:
    q, k, v = tensors(26)
    mask = torch.arange(26) < torch.tensor([[26], [11]])
    for overlap, chunks in itertools.product((False, True), (2, 5, 9, 30)):
        options = {"window_size": 4, "num_chunks": chunks, "chunking": "published", "overlap_window": overlap}
        together = eva_attention(q, k, v, key_mask=mask, **options)
        assert_same(together[1:, :, :11], eva_attention(*(z[1:, :, :11] for z in (q, k, v)), **options))
        assert_same(together[:1], eva_attention(q[:1], k[:1], v[:1], **options))


def test_room_for_the_chunks_of_every_row() -> None:
    # A shorter row can have more chunks than the longest one.
    for window, chunks, longest in itertools.product((1, 3, 4), (1, 2, 3, 5, 8), (3, 12, 30, 90)):
        padded = -(-longest // window) * window
        counts = [-(-n // max(1, n // chunks)) for n in range(window, padded + 1, window)]
        room = _most_chunks(window, chunks, padded)
        assert max(counts) <= room <= max(chunks + 1, *counts)


def test_a_wider_bias_is_cut_to_what_is_seen() -> None:
    q, k, v = tensors(23)
    bias = random(2, 6, 18)
    for chunks in (23, 6, 4):  # the window reaches 3, 4 and 6 tokens
        options = {"window_size": 6, "num_chunks": chunks, "overlap_window": True}
        reach = {23: 3, 6: 6, 4: 6}[chunks]
        full = eva_attention(q, k, v, window_bias=bias, **options)
        assert_same(full, eva_attention(q, k, v, window_bias=bias[..., 6 - reach : 12 + reach], **options))
        with pytest.raises(InputError, match=f"reach >= {reach}"):
            eva_attention(q, k, v, window_bias=bias[..., 7 - reach : 11 + reach], **options)
    with_windows = bias[None, :, None].expand(2, 2, 4, 6, 18)
    assert_same(eva_attention(q, k, v, window_bias=with_windows, **options), full)


def test_a_bias_on_short_inputs() -> None:
    q, k, v = tensors(5)
    bias, keep = random(2, 8, 24), torch.ones(2, 5, dtype=torch.bool)
    logits = q @ k.transpose(-1, -2) * 3**-0.5 + bias[:, :5, 8:13]
    exact = logits.softmax(-1) @ v
    assert_same(eva_attention(q, k, v, window_size=8, overlap_window=True, window_bias=bias), exact)
    short = {"window_size": 8, "overlap_window": True, "window_bias": bias, "key_mask": keep}
    assert_same(eva_attention(q, k, v, **short), exact)


def test_wrong_options_are_refused() -> None:
    q, k, v = tensors(23)
    for change in (
        {"chunking": "official"},
        {"weighting": None},
        {"proposals": "query"},
        {"noise_scale": "unit"},
        {"chunk_size": 0},
        {"chunk_size": 3},
        {"overlap_side": "right", "overlap_window": True},
        {"overlap_side": "left"},
        {"chunk_size": 3, "chunking": "published", "is_causal": True},
        {"noise": torch.zeros(2, 2, 2, 3)},
        {"window_bias": torch.zeros(4, 4)},
        {"window_bias": torch.zeros(3, 4, 4)},
        {"window_bias": torch.zeros(2, 4, 6)},
        {"window_bias": torch.zeros(2, 3, 4)},
        {"window_bias": torch.zeros(2, 4, 7), "overlap_window": True},
    ):
        with pytest.raises(InputError):
            eva_attention(q, k, v, **{"window_size": 4, "num_chunks": 6, **change})
    with pytest.raises(UnsupportedError, match="to the left"):
        eva_attention(q, k, v, window_size=8, is_causal=True, overlap_window=True, overlap_side="both")
    with pytest.raises(UnsupportedError, match="needs a sequence"):
        eva_attention(*tensors(20), window_size=2, grid=(4, 5), overlap_window=True, overlap_side="left")
