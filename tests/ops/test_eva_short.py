"""The short road of EVA gives what the long one gives, and is taken where it can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, inputs, patch_with_spy, random
from torch import Tensor

from hf_linattn.kernels.short_chunks import reading
from hf_linattn.ops.eva import short
from hf_linattn.ops.eva.attention import eva_attention
from hf_linattn.ops.eva.learned import LearnedSummariser, learned_eva_attention
from hf_linattn.ops.proposal_map import ResidualMap

HEADS, DIM = 2, 4
SQUARE, ROW = (HEADS, DIM, DIM), (HEADS, DIM)
MAPS = [random(*s, seed=50 + i, scale=0.6) for i, s in enumerate((ROW, ROW, SQUARE, SQUARE, (HEADS,), ROW, ROW))]
# tokens, window, chunks: chunks of one token, shorter than a window, of a window, longer; parts of windows and chunks
LAYOUTS = [(12, 4, 12), (12, 4, 6), (16, 4, 4), (24, 4, 3), (13, 4, 12), (13, 4, 4), (17, 4, 2), (5, 1, 2), (9, 8, 3)]
KINDS: dict[str, dict[str, Any]] = {
    "sum": {},
    "mean": {"proposals": "mean", "weighting": "none"},
    "key": {"proposals": "key"},
    "none": {"proposals": "none"},
    "learned": {},
}


def attend(kind: str, tensors: list[Tensor], maps: list[Tensor], **options: Any) -> Tensor:
    if kind == "learned":
        return learned_eva_attention(*tensors, LearnedSummariser(*maps), **options)
    with_maps = {"query_map": ResidualMap(maps[2]), "key_map": ResidualMap(maps[3])} if maps else {}
    return eva_attention(*tensors, **KINDS[kind], **with_maps, **options)


def with_gradients(kind: str, tensors: list[Tensor], maps: list[Tensor], **options: Any) -> list[Tensor]:
    """The output, and the gradients of all that it depends on."""
    leaves = [z.detach().requires_grad_() for z in (*tensors, *maps)]
    output = attend(kind, leaves[:3], leaves[3:], **options)
    if options.get("real_first"):  # what padded queries read is nobody's
        output = output.masked_fill(~options["key_mask"][:, None, :, None], 0.0)
    grads = torch.autograd.grad(output, leaves, random(*output.shape, seed=9), allow_unused=True)
    found = [torch.zeros_like(z) if g is None else g for z, g in zip(leaves, grads, strict=True)]
    if options.get("real_first"):
        found[:3] = [z.masked_fill(~options["key_mask"][:, None, :, None], 0.0) for z in found[:3]]
    return [output, *found]


def on_both_roads(
    patch: pytest.MonkeyPatch, kind: str, tensors: list[Tensor], with_maps: bool, **options: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs and gradients of the short road, of the same in parts, and of the long road."""
    given = kind, tensors, MAPS if with_maps else []
    name = "short_pooled" if kind == "learned" else "short_variates"
    patch.setattr(short, "LONGEST", 100)
    with patch.context() as spied:
        spy = patch_with_spy(spied, f"hf_linattn.ops.eva.short.{name}")
        found = with_gradients(*given, **options)
        assert spy
    patch.setattr(reading, "_PART", 1)  # one head of one row at a time
    in_parts = with_gradients(*given, **options)
    patch.setattr(short, "LONGEST", 0)
    return found, in_parts, with_gradients(*given, **options)


BOTH = pytest.mark.parametrize(
    ("kind", "with_maps"), [("learned", True), *((kind, maps) for kind in list(KINDS)[:-1] for maps in (False, True))]
)
SOME = pytest.mark.parametrize(("kind", "with_maps"), [("learned", True), ("sum", True), ("mean", False)])


def assert_all_same(*found: list[Tensor]) -> None:
    for ours, parts, expected in zip(*found, strict=True):
        assert_same(ours, expected)
        assert_same(parts, expected)


@BOTH
@pytest.mark.parametrize(("tokens", "window", "chunks"), LAYOUTS)
def test_equals_the_long_road(
    kind: str, tokens: int, window: int, chunks: int, with_maps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"window_size": window, "num_chunks": chunks}
    if chunks == tokens and not with_maps:
        return  # every key for itself: neither road
    assert_all_same(*on_both_roads(monkeypatch, kind, inputs(tokens), with_maps, **options))


# Grid, window, chunks, global tokens: chunks as large as windows, smaller, larger, of one patch; partly filled ones.
GRIDS = [
    ((4, 6), 2, 6, 1),
    ((4, 4), 4, 4, 0),
    ((5, 7), 4, 16, 2),
    ((6, 5), 2, 4, 1),
    ((3, 7), 2, 49, 1),
    ((8, 1), 2, 9, 0),
]


@SOME
@pytest.mark.parametrize(("grid", "window", "chunks", "first"), GRIDS)
def test_images(
    kind: str,
    with_maps: bool,
    grid: tuple[int, int],
    window: int,
    chunks: int,
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"window_size": window, "num_chunks": chunks, "grid": grid, "num_global_tokens": first}
    tensors = inputs(grid[0] * grid[1] + first, batch=3)
    if window >= max(grid) or (chunks >= max(grid) ** 2 and not with_maps):
        return
    assert_all_same(*on_both_roads(monkeypatch, kind, tensors, with_maps, **options))


@SOME
@pytest.mark.parametrize(("tokens", "window", "chunks"), LAYOUTS)
def test_global_tokens_of_a_sequence(
    kind: str, with_maps: bool, tokens: int, window: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"window_size": window, "num_chunks": chunks, "num_global_tokens": 2}
    if chunks == tokens and not with_maps:
        return
    assert_all_same(*on_both_roads(monkeypatch, kind, inputs(tokens + 2), with_maps, **options))


LENGTHS = {
    "alike": [13, 13, 13],
    "mixed": [17, 9, 5],
    "short": [17, 3, 1],
    "empty": [12, 0, 17],
    "chunks": [16, 8, 6],
    "few": [3, 3, 3],
}


@SOME
@pytest.mark.parametrize("where", ["end", "start", "between", "real first"])
@pytest.mark.parametrize(("window", "chunks"), [(4, 12), (4, 4), (4, 2), (8, 3)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_padding(
    kind: str,
    with_maps: bool,
    where: str,
    window: int,
    chunks: int,
    lengths: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = torch.tensor(LENGTHS[lengths])[:, None]
    mask = torch.arange(17) < count
    if where == "start":
        mask = mask.flip(-1)
    elif where == "between":
        mask = mask[:, torch.randperm(17, generator=torch.Generator().manual_seed(0))]
    tensors = [
        z.masked_fill(~mask[:, None, :, None], 0.0 if where == "real first" else float("nan"))
        for z in inputs(17, batch=3)
    ]
    options = {"window_size": window, "num_chunks": chunks, "key_mask": mask, "real_first": where == "real first"}
    assert_all_same(*on_both_roads(monkeypatch, kind, tensors, with_maps, **options))


@pytest.mark.parametrize(
    ("options", "is_short"),
    [
        ({}, True),
        ({"weighting": "spread"}, False),
        ({"overlap_window": True}, False),
        ({"is_causal": True}, False),
        ({"num_global_tokens": 1}, True),
        ({"num_global_tokens": 1, "key_mask": torch.ones(2, 12, dtype=torch.bool)}, False),
        ({"grid": (4, 3), "window_size": 2}, True),
        ({"grid": (4, 3)}, False),
        ({"noise": True}, False),
        ({"slot_dropout": 0.1}, False),
        ({"chunking": "published"}, False),
        ({"key_map": torch.tanh}, False),
        ({"key_mask": torch.ones(2, 12, dtype=torch.bool)}, True),
        ({"window_bias": torch.zeros(1, 4, 4)}, False),
        ({"window_size": 12}, False),
    ],
)
def test_which_inputs_are_short(options: dict[str, Any], is_short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short, "LONGEST", 12)
    spy = patch_with_spy(monkeypatch, "hf_linattn.ops.eva.short.short_variates")
    eva_attention(*inputs(12), **({"window_size": 4, "num_chunks": 6} | options))
    assert bool(spy) == is_short
    fitting = {"grid": None, "key_mask": None, "num_global_tokens": 0}  # what would not fit, or not be longer
    eva_attention(*inputs(13), **({"window_size": 4, "num_chunks": 6} | options | fitting))
    assert len(spy) == is_short


def test_chunks_of_one_token_are_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short, "LONGEST", 100)
    query, key, value = inputs(13)
    expected = torch.softmax(query @ key.mT * DIM**-0.5, -1) @ value
    spy = patch_with_spy(monkeypatch, "hf_linattn.ops.eva.short.short_variates")
    assert_same(eva_attention(query, key, value, window_size=4, num_chunks=13), expected)
    assert not spy


def test_chunks_that_no_query_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An offset of -inf leaves one head with its windows alone."""
    maps = [z.clone() for z in MAPS]
    maps[4][0] = -float("inf")
    options = {"window_size": 4, "num_chunks": 6}
    found = []
    for longest in (100, 0):
        monkeypatch.setattr(short, "LONGEST", longest)
        found.append(attend("learned", inputs(22), maps, **options))
    assert_same(*found)


@pytest.mark.parametrize("kind", ["sum", "learned"])
def test_each_of_a_batch_of_models(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `vmap` rows have parameters of their own."""
    monkeypatch.setattr(short, "LONGEST", 100)
    stacked = [torch.stack([z, z * 0.5, -z]) for z in MAPS]
    tensors, options = inputs(13), {"window_size": 4, "num_chunks": 6}

    def loss(*maps: Tensor) -> Tensor:
        return attend(kind, tensors, list(maps), **options).square().sum()

    places = tuple(range(7)) if kind == "learned" else (2, 3)
    together = torch.func.vmap(torch.func.grad(loss, argnums=places))(*stacked)
    for i in range(3):
        for ours, expected in zip(
            together, torch.func.grad(loss, argnums=places)(*(z[i] for z in stacked)), strict=True
        ):
            assert_same(ours[i], expected, atol=1e-10)


@pytest.mark.parametrize("kind", ["sum", "learned"])
def test_gradients_where_logits_are_large(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are normalised anew where rounding shows: a query's gradient cancels what all keys have in common."""
    monkeypatch.setattr(short, "LONGEST", 100)
    query, key, value = inputs(16)
    tensors, options = [query + 8, key + 8, value], {"window_size": 4, "num_chunks": 8}
    maps = MAPS if kind == "learned" else []
    expected = with_gradients(kind, tensors, maps, **options)[1]
    leaves = [z.float().requires_grad_() for z in tensors]
    output = attend(kind, leaves, [z.float() for z in maps], **options)
    (found,) = torch.autograd.grad(output, leaves[:1], random(*output.shape, seed=9).float())
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def test_nothing_is_read_across_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short, "LONGEST", 100)
    tensors, options = inputs(13, batch=3), {"window_size": 4, "num_chunks": 6}
    together = eva_attention(*tensors, **options)
    for row in range(3):
        assert_same(eva_attention(*(z[row : row + 1] for z in tensors), **options)[0], together[row])
