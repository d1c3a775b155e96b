"""The formulas on one page (`ops.reference`) against the functions that people call, for what both have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from variants import directions, fixed_statistics, proposals

from hf_linattn.functional import eva_attention, favor_attention, lara_attention, softmax_attention
from hf_linattn.ops.reference import eva_reference, favor_reference, lara_reference

MASKS = {"none": None, "holes": torch.tensor([[1, 0, 1] * 7 + [1, 1], [0, 0] + [1] * 10 + [0] * 11]).bool()}


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 23, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def assert_same(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "where",
    [{}, {"window_size": 4}, {"is_causal": True, "window_size": 5}, {"num_global_tokens": 2, "window_size": 3}],
    ids=str,
)
def test_feature_maps_and_proposals(where: dict[str, Any], mask: str) -> None:
    q, k, v = inputs()
    where = {"key_mask": MASKS[mask], **where}
    for statistics in (None, fixed_statistics(2, 4), fixed_statistics(2, 4, dense=True)):
        arguments = (q, k, v, directions(2, 4))
        ours = favor_attention(*arguments, statistics=statistics, **where)
        assert_same(ours, favor_reference(*arguments, statistics=statistics, **where))
    for options in ({"proposals": proposals(2, 4)}, {"num_landmarks": 5}):
        if "proposals" in options or not where.get("is_causal"):
            assert_same(lara_attention(q, k, v, **options, **where), lara_reference(q, k, v, **options, **where))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window", "chunk"), [(1, 1), (4, 2), (4, 4), (6, 2), (32, 4)])
def test_windows_and_chunks(window: int, chunk: int, is_causal: bool, mask: str) -> None:
    options = {"window_size": window, "chunk_size": chunk, "is_causal": is_causal, "key_mask": MASKS[mask]}
    assert_same(eva_attention(*inputs(), **options), eva_reference(*inputs(), **options))


def test_all_exact_is_softmax_attention() -> None:
    q, k, v = inputs()
    exact = softmax_attention(q, k, v, is_causal=True)
    assert_same(favor_reference(q, k, v, directions(2, 4), window_size=23, is_causal=True), exact)
    assert_same(eva_reference(q, k, v, window_size=23, chunk_size=1, is_causal=True), exact)
