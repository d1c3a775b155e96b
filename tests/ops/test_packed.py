"""Packed sequences: each gives what it gives alone, outputs and gradients, and none knows of another."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import CAUSAL, VARIANTS, Variant, name_of

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import (
    RowNoise,
    SlotDropout,
    draw_projection,
    eva_attention,
    favor_attention,
    favor_statistics,
    generalized_attention,
    lara_attention,
    softmax_attention,
)
from hf_linattn.ops import row_groups

HEADS, DIM = 2, 4
PROJECTION = draw_projection(HEADS, 6, DIM, seed=2)


def _softmax(q: Tensor, k: Tensor, v: Tensor, *, window_size: int, **options: Any) -> Tensor:
    return softmax_attention(q, k, v, **options)


def _generalized(q: Tensor, k: Tensor, v: Tensor, *, window_size: int, **options: Any) -> Tensor:
    return generalized_attention(q, k, v, draw_projection(HEADS, 7, DIM, seed=1).to(q), **options)


ALL = [
    *VARIANTS,
    *[Variant(f"softmax-{causal}", _softmax, causal) for causal in (False, True)],
    *[Variant(f"generalized-{causal}", _generalized, causal) for causal in (False, True)],
]


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def inputs(total: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, total, HEADS, DIM, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]
    return [z.requires_grad_() for z in made]


def alone(attend: Any, tokens: list[Tensor], lengths: list[int], **options: Any) -> Tensor:
    """Every sequence in a call of its own."""
    pieces = zip(*(z.split(lengths, dim=2) for z in tokens), strict=True)
    return torch.cat([attend(*piece, **options) if piece[0].shape[2] else piece[0] for piece in pieces], dim=2)


def agree(mine: Tensor, theirs: Tensor, tokens: list[Tensor], tolerance: float) -> None:
    """Outputs and the gradients of a sum with random weights."""
    torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    weights = torch.randn_like(mine)
    pairs = zip(*(torch.autograd.grad(y, tokens, weights, allow_unused=True) for y in (mine, theirs)), strict=True)
    for one, other in pairs:
        if other is not None:
            scale = max(1.0, float(other.abs().max()))
            torch.testing.assert_close(one / scale, other / scale, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attend", ALL, ids=name_of)
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 26), min_size=1, max_size=7).filter(any),
    window=st.sampled_from([0, 2, 4, 8]),
    cost=st.sampled_from([0, 20, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_each_sequence_gives_what_it_gives_alone(
    attend: Variant, lengths: list[int], window: int, cost: int, dtype: torch.dtype, seed: int
) -> None:
    tokens = inputs(sum(lengths), seed, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(row_groups._GROUP_COST, "cpu", cost)  # from a group for each length to one for all
        packed = attend(*tokens, window_size=window, cu_seqlens=borders(lengths))
    agree(packed, alone(attend, tokens, lengths, window_size=window), tokens, 1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("attend", CAUSAL, ids=name_of)
def test_no_gradient_crosses_a_border(attend: Variant) -> None:
    lengths = [9, 14, 5]
    tokens = inputs(sum(lengths))
    output = attend(*tokens, window_size=4, cu_seqlens=borders(lengths))
    grads = torch.autograd.grad(output[:, :, 9:23].square().sum(), tokens)
    for grad in grads:
        assert not grad[:, :, :9].any()
        assert not grad[:, :, 23:].any()


def _favor(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return favor_attention(q, k, v, PROJECTION, **options)


def _slow(name: str) -> Any:
    return pytest.param(name, "aot_eager", marks=pytest.mark.slow)


COMPILED = {
    "favor_plus": Variant("", _favor, False),
    "favor_plus-causal": Variant("", _favor, True),
    "lara": Variant("", functools.partial(lara_attention, num_landmarks=3), False),
    "eva": Variant("", functools.partial(eva_attention, num_chunks=3), False),
    "eva-causal": Variant("", functools.partial(eva_attention, chunk_size=2), True),
}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        _slow("favor_plus"),
        ("favor_plus-causal", "aot_eager"),
        _slow("lara"),
        _slow("eva"),
        _slow("eva-causal"),
        pytest.param("eva-causal", "inductor", marks=pytest.mark.slow),
        pytest.param("favor_plus-causal", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled(name: str, backend: str) -> None:
    """In one graph; other borders of as many sequences need no other."""
    attend = COMPILED[name]

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return attend(q, k, v, window_size=4, cu_seqlens=cu_seqlens, max_seqlen=16)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for lengths in ([9, 14, 5], [16, 12, 0], [1, 11, 16]):
        tokens = inputs(28)
        with torch._dynamo.config.patch(error_on_recompile=lengths != [9, 14, 5]):
            packed = compiled(*tokens, borders(lengths))
        agree(packed, alone(attend, tokens, lengths, window_size=4), tokens, 1e-5)
    with pytest.raises(RuntimeError, match="no sequence may be longer than max_length"):
        compiled(*tokens, borders([17, 10, 1]))


def test_what_belongs_to_sequences_goes_to_theirs() -> None:
    """Statistics, noise and dropout, with groups that change the order of the sequences."""
    lengths = [20, 3, 18, 0, 5]
    tokens, packed = inputs(sum(lengths)), {"cu_seqlens": borders(lengths)}
    noise = RowNoise.keyed(7, torch.arange(5))
    statistics = favor_statistics(*tokens[:2], **packed)
    output = favor_attention(
        *tokens, PROJECTION, statistics=statistics, window_size=2, slot_dropout=SlotDropout(0.4, noise), **packed
    )
    samples = lara_attention(*tokens, num_landmarks=2, noise=noise, **packed)
    assert statistics.shape.shape[0] == 5
    pieces = zip(*(z.split(lengths, dim=2) for z in tokens), strict=True)
    for number, piece in enumerate(pieces):
        if not lengths[number]:
            continue
        own = noise.of_rows(torch.tensor([number]))
        stats = favor_statistics(*piece[:2])
        here = slice(sum(lengths[:number]), sum(lengths[: number + 1]))
        dropout = SlotDropout(0.4, own)
        one = favor_attention(*piece, PROJECTION, statistics=stats, window_size=2, slot_dropout=dropout)
        torch.testing.assert_close(output[:, :, here], one, atol=1e-5, rtol=1e-5)
        one = lara_attention(*piece, num_landmarks=2, noise=own)
        torch.testing.assert_close(samples[:, :, here], one, atol=1e-5, rtol=1e-5)


WRONG = {
    "key_mask": ({"key_mask": torch.ones(1, 9, dtype=torch.bool)}, "Leave padding out"),
    "grid": ({"grid": (3, 3)}, "stack images along the batch"),
    "longest": ({"max_seqlen": 0}, "max_seqlen must be"),
    "noise": ({"noise": torch.zeros(1, HEADS, 2, DIM)}, "noise cannot be a tensor"),
    "rows of noise": ({"noise": RowNoise.keyed(1, torch.arange(4))}, "2 packed sequences; got that of 4"),
    "bias": ({"window_bias": torch.zeros(1, 1, 1, 4, 4)}, "window_bias must be"),
    "borders": ({"cu_seqlens": borders([4, 4])}, "end at the number of tokens"),
    "alone": ({"cu_seqlens": None, "max_seqlen": 9}, "goes with cu_seqlens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_meaning_raises(name: str) -> None:
    options, words = WRONG[name]
    with pytest.raises((InputError, UnsupportedError), match=words):
        eva_attention(*inputs(9), **{"window_size": 4, "cu_seqlens": borders([4, 5]), **options})


def test_other_rows_raise() -> None:
    query, key, value = inputs(9)
    for tokens in ((query[:, :, 1:], key, value), tuple(z.expand(2, -1, -1, -1) for z in (query, key, value))):
        with pytest.raises(InputError, match="Packed sequences are one row"):
            favor_attention(*tokens, PROJECTION, is_causal=True, cu_seqlens=borders([4, 5]))
    with pytest.raises(UnsupportedError, match="is_cross cannot be given"):
        favor_attention(query, key, value, PROJECTION, is_cross=True, cu_seqlens=borders([4, 5]))
