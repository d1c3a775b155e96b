"""Moments of queries and keys gathered in pieces, and FAVOR#'s statistics from them."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_inputs import DIM, HEADS, MASK, centred_or_not, every_variant, inputs
from torch import Tensor

from hf_linattn.errors import InputError
from hf_linattn.ops.favor import moments
from hf_linattn.ops.favor.statistics import FAVOR_VARIANTS, FavorMoments, favor_statistics


def batches(count: int = 5) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    out = []
    for number in range(count):
        tokens = 3 + 4 * number
        q, k = inputs(tokens, seed=0)  # one distribution
        q, k = (z[:, :, torch.randperm(tokens, generator=generator)] * (1 + 0.3 * number) for z in (q, k))
        mask = torch.rand(2, tokens, generator=generator) < 0.7
        out.append((q, k, mask if number != 3 else torch.zeros_like(mask)))  # one batch is all padding
    return out


def gathered(parts: list[tuple[Tensor, Tensor, Tensor]]) -> FavorMoments:
    moments = FavorMoments.empty(HEADS, DIM)
    for q, k, mask in parts:
        moments = moments.update(q, k, key_mask=mask)
    return moments


def assert_equal_moments(ours: FavorMoments, expected: FavorMoments) -> None:
    for name, value in ours.tensors().items():
        torch.testing.assert_close(value, expected.tensors()[name], rtol=1e-11, atol=1e-11, msg=name)


def all_at_once() -> FavorMoments:
    parts = [[z[b : b + 1, :, mask[b]] for z in (q, k)] for q, k, mask in batches() for b in range(2)]
    q, k = (torch.cat([part[i] for part in parts], dim=2) for i in range(2))
    return FavorMoments.empty(HEADS, DIM).update(q, k)


@given(order=st.permutations(range(5)), cuts=st.lists(st.integers(0, 5), min_size=2, max_size=2))
@settings(max_examples=examples(25))
def test_pieces_in_any_order_are_the_whole(order: list[int], cuts: list[int]) -> None:
    parts = [batches()[i] for i in order]
    first, second = sorted(cuts)
    a, b, c = gathered(parts[:first]), gathered(parts[first:second]), gathered(parts[second:])
    expected = all_at_once()
    assert_equal_moments(a + b + c, expected)
    assert_equal_moments(c + (a + b), expected)
    assert float(expected.key_count) == sum(int(mask.sum()) for _, _, mask in parts)


@every_variant
@centred_or_not
def test_statistics_from_moments_are_those_of_the_tokens(variant: str, centring: bool) -> None:
    q, k = inputs(batch=1)
    parts = [(q[:, :, :9], k[:, :, :9]), (q[:, :, 9:], k[:, :, 9:])]
    moments = FavorMoments.empty(HEADS, DIM)
    for query, key in parts:
        moments = moments.update(query, key)
    for ours, expected in zip(
        moments.statistics(variant, centring), favor_statistics(q, k, variant=variant, centring=centring), strict=True
    ):
        torch.testing.assert_close(ours, expected)
    # A batch counts as one long row.
    rows = FavorMoments.empty(HEADS, DIM).update(*(torch.cat(z.split([11, 12], 2)[:1] * 2) for z in (q, k)))
    assert float(rows.query_count) == 22


def test_large_means_cost_no_precision() -> None:
    q, k = (z.float() for z in inputs(64, batch=1))
    centre = torch.randn(1, HEADS, 1, DIM).round() * 4096
    moved_q, moved_k = q + centre, k - centre
    q, k = moved_q - centre, moved_k + centre  # what float32 has kept of them
    plain, moved = FavorMoments.empty(HEADS, DIM), FavorMoments.empty(HEADS, DIM)
    for tokens in torch.arange(64).split(10):
        plain = plain.update(q[:, :, tokens], k[:, :, tokens])
        moved = moved.update(moved_q[:, :, tokens], moved_k[:, :, tokens])
    torch.testing.assert_close(moved.query_scatter, plain.query_scatter, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moved.key_scatter, plain.key_scatter, rtol=1e-8, atol=1e-8)


def test_which_queries_a_mask_means() -> None:
    q, k = inputs()
    mask = MASK
    empty = FavorMoments.empty(HEADS, DIM)
    last = empty.update(q[:, :, -6:], k, key_mask=mask, is_causal=True)
    assert float(last.query_count) == int(mask[:, -6:].sum())
    other = empty.update(q[:, :, -6:], k, key_mask=mask)  # of another sequence
    assert (float(other.query_count), float(other.key_count)) == (12, int(mask.sum()))
    same = empty.update(q, k, key_mask=mask, is_cross=True)
    assert (float(same.query_count), float(same.key_count)) == (46, int(mask.sum()))


def test_moments_refuse_what_does_not_fit() -> None:
    q, k = inputs()
    for wrong in ((q[:, :1], k[:, :1]), (q[..., :2], k[..., :2])):
        with pytest.raises(InputError, match="2 heads of dimension 4"):
            FavorMoments.empty(HEADS, DIM).update(*wrong)


def test_no_tokens_give_neutral_statistics() -> None:
    for variant, centring in itertools.product(FAVOR_VARIANTS, (False, True)):
        stats = FavorMoments.empty(HEADS, DIM).statistics(variant, centring)
        assert all(s.isfinite().all() for s in stats)
        assert not stats.shape.any()


def test_long_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs()
    whole = [favor_statistics(q, k, key_mask=MASK, variant=variant) for variant in FAVOR_VARIANTS]
    monkeypatch.setattr(moments, "_PIECE", 5)
    for variant, expected in zip(FAVOR_VARIANTS, whole, strict=True):
        for ours, theirs in zip(favor_statistics(q, k, key_mask=MASK, variant=variant), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
