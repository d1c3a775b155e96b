"""EVA's options where layouts differ: gradients, half precision, padding, biases, and what is refused."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers import assert_same, random
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import eva_attention
from hf_linattn.ops.eva.published import _most_chunks


@functools.cache
def tensors(tokens: int, heads: int = 2, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(batch, heads, tokens, 3, generator=generator, dtype=torch.float64) for _ in range(3))


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
