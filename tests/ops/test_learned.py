"""Learned maps against the dense formulas: layouts, gradients, recurrence, and where training starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import MASKS, assert_same, inputs, patch_with_spy, random

from hf_linattn.functional import FavorMoments, FavorStatistics, draw_projection, favor_attention
from hf_linattn.ops.learned import (
    NORMALIZERS,
    LearnedFeatureMap,
    learned_attention,
    learned_recurrence,
    learning_start,
)
from hf_linattn.ops.reference import learned_reference
from hf_linattn.ops.slot_attention import SlotOptions

pytestmark = pytest.mark.usefixtures("road")

HEADS, SLOTS, DIM = 2, 5, 4
SHAPES = {
    "query_directions": (SLOTS, DIM),
    "key_directions": (SLOTS, DIM),
    "query_shift": (DIM,),
    "key_shift": (DIM,),
    "slot_bias": (SLOTS,),
    "far_offset": (),
    "far_slope": (DIM,),
}
every_normalizer = pytest.mark.parametrize("normalizer", [*NORMALIZERS, "statistics"])


def maps(normalizer: str = "slots") -> LearnedFeatureMap:
    """Random maps; "statistics" are those with the kernel in the coordinates of FAVOR#."""
    tensors = {name: random(HEADS, *shape, seed=100 + i, scale=0.7) for i, (name, shape) in enumerate(SHAPES.items())}
    if normalizer == "statistics":
        return LearnedFeatureMap(**tensors, normalizer="kernel", statistics=statistics_of("dense"))
    return LearnedFeatureMap(**tensors, normalizer=normalizer)


def statistics_of(variant: str) -> FavorStatistics:
    query, key, _ = inputs(40)
    return FavorMoments.empty(HEADS, DIM).update(query, key).statistics(variant)


def test_kernels_get_the_tokens_of_a_head_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections leave those of other heads between them: every kernel would copy them."""
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs()]
    with monkeypatch.context() as patch:
        spy = patch_with_spy(patch, "hf_linattn.ops.short_attention.exact_attention")
        found = learned_attention(*spread, maps(), window_size=4, chunk_size=32)
    assert all(x.is_contiguous() for x in (spy[0].query, spy[0].key, spy[0].value))
    assert_same(found, learned_attention(*inputs(), maps(), window_size=4))


@every_normalizer
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3, 8, 64])
def test_is_the_dense_formula(normalizer: str, mask: str, is_causal: bool, window: int) -> None:
    where = {"key_mask": MASKS[mask], "is_causal": is_causal, "window_size": window}
    tensors = inputs()
    expected = learned_reference(*tensors, maps(normalizer), **where)
    for chunk_size in (None, 1, 8, 64):
        assert_same(learned_attention(*tensors, maps(normalizer), chunk_size=chunk_size, **where), expected)


@every_normalizer
@pytest.mark.parametrize("window", [0, 2])
def test_on_images_with_a_global_token(normalizer: str, window: int) -> None:
    where = {"grid": (4, 6), "num_global_tokens": 1, "window_size": window}
    tensors = inputs(25)
    expected = learned_reference(*tensors, maps(normalizer), **where)
    assert_same(learned_attention(*tensors, maps(normalizer), **where), expected)


def test_a_key_spreads_one_unit_of_weight() -> None:
    _, key, _ = inputs()
    torch.testing.assert_close(
        maps().key_weights(key).dense().exp().sum(-1), torch.ones(2, HEADS, key.shape[2]).double()
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 4])
def test_with_the_kernel_it_starts_at_favor_plus(is_causal: bool, window: int) -> None:
    projection = draw_projection(HEADS, SLOTS, DIM, seed=0).double()
    zero = {name: torch.zeros(HEADS, *shape).double() for name, shape in SHAPES.items()}
    start = LearnedFeatureMap(
        **{**zero, "query_directions": projection, "key_directions": projection}, normalizer="kernel"
    )
    options = {"is_causal": is_causal, "window_size": window}
    assert_same(learned_attention(*inputs(), start, **options), favor_attention(*inputs(), projection, **options))


@every_normalizer
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("overlap", [False, True])
def test_token_by_token(normalizer: str, window: int, overlap: bool) -> None:
    if overlap and not window:
        pytest.skip("no window to overlap")
    options = {"window_size": window, "overlap_window": overlap}
    query, key, value = inputs()
    expected = learned_attention(query, key, value, maps(normalizer), is_causal=True, **options)
    recurrence = learned_recurrence(maps(normalizer), scaling=DIM**-0.5, **options)
    state, found = recurrence.start(key, value), []
    for token in range(key.shape[2]):
        one = [z[:, :, token : token + 1] for z in (query, key, value)]
        output, state = recurrence.step(*one, state)
        found.append(output)
    assert_same(torch.cat(found, 2), expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "right", "holes"])
def test_the_start_has_the_mass_of_the_far_keys(is_causal: bool, mask: str) -> None:
    """The mean over queries of the log-mass outside of the window, exact and through the slots."""
    query, key, _ = inputs(64 if mask == "none" else 23, scale=0.8)
    windows, options = SlotOptions(is_causal, window_size=4), {"key_mask": MASKS[mask], "scaling": 0.5}
    start = learning_start(query, key, maps(), windows, **options)
    real = torch.ones(2, key.shape[2]).bool() if MASKS[mask] is None else MASKS[mask]
    mean = (query * 0.5**0.5 * real[:, None, :, None]).sum((0, 2)) / real.sum()
    torch.testing.assert_close(start["query_shift"].double(), mean, atol=1e-6, rtol=1e-5)
    again = learning_start(query, key, replace(maps(), **start), windows, **options)
    torch.testing.assert_close(again, start)
    lifted = learning_start(query, key, replace(maps(), slot_bias=maps().slot_bias + 1.0), windows, **options)
    torch.testing.assert_close(lifted["far_offset"], start["far_offset"] - 1.0, atol=1e-4, rtol=1e-4)


@every_normalizer
def test_the_start_keeps_the_log_weights(normalizer: str) -> None:
    """Those of queries but for the offset; with the kernel those of queries and keys together."""
    query, key, _ = inputs(64, scale=0.8)
    before = maps(normalizer)
    start = learning_start(query, key, before, SlotOptions(False, window_size=4), scaling=0.5)
    after = replace(before, **start)
    x, y = (z * 0.5**0.5 for z in (query, key))
    moved = after.query_weights(x).dense() - before.query_weights(x).dense()
    if before.normalizer == "kernel":
        moved = moved + (after.key_weights(y).dense() - before.key_weights(y).dense()).mean(2, keepdim=True)
    slope = (before.far_slope * (before.query_shift - start["query_shift"])).sum(-1)
    expected = start["far_offset"] - before.far_offset + slope
    torch.testing.assert_close(moved, expected[None, :, None, None].expand_as(moved).double(), atol=1e-5, rtol=1e-5)


def test_the_start_makes_uniform_attention_exact() -> None:
    """Keys that are all alike: every query's far mass is the number of far keys times that of one."""
    query, key, value = inputs(32, batch=1)
    query, key = query[:, :, :1].expand_as(query), key[:, :, :1].expand_as(key)
    feature_map = replace(maps(), **learning_start(query, key, maps(), SlotOptions(False, window_size=4)))
    ours = learned_attention(query, key, value, feature_map, window_size=4)
    torch.testing.assert_close(ours, value.mean(2, keepdim=True).expand_as(ours), atol=1e-4, rtol=1e-4)
