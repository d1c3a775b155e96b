"""EVA with learned trained against the dense formulas: layouts, gradients, recurrence, and where training starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import MASKS, assert_same, inputs, patch_with_spy, random
from torch import Tensor

from hf_linattn.functional import eva_attention
from hf_linattn.ops.eva import short
from hf_linattn.ops.eva.learned import (
    LearnedSummariser,
    eva_learning_start,
    learned_eva_attention,
    learned_eva_recurrence,
)
from hf_linattn.ops.reference import learned_eva_reference

HEADS, DIM = 2, 4
SHAPES = {
    "key_pooling": (DIM,),
    "value_pooling": (DIM,),
    "key_adapter": (DIM, DIM),
    "query_adapter": (DIM, DIM),
    "far_offset": (),
    "far_slope": (DIM,),
    "key_slope": (DIM,),
}
trained = LearnedSummariser(
    **{name: random(HEADS, *shape, seed=100 + i, scale=0.7) for i, (name, shape) in enumerate(SHAPES.items())}
)
untrained = LearnedSummariser(**{name: torch.zeros(HEADS, *shape).double() for name, shape in SHAPES.items()})


def test_kernels_get_the_tokens_of_a_head_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs()]
    where = {"window_size": 4, "chunk_size": 2}
    monkeypatch.setattr(short, "LONGEST", 0)
    with monkeypatch.context() as patch:
        spy = patch_with_spy(patch, "hf_linattn.ops.eva.learned.eva_estimate")
        found = learned_eva_attention(*spread, trained, **where)
    assert all(x.is_contiguous() for x in (spy[0].query, spy[0].key, spy[0].value))
    assert_same(found, learned_eva_attention(*inputs(), trained, **where))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window", "chunk"), [(1, 1), (3, 1), (4, 2), (8, 4), (6, 6), (64, 16)])
def test_is_the_dense_formula(mask: str, is_causal: bool, window: int, chunk: int) -> None:
    where = {"key_mask": MASKS[mask], "is_causal": is_causal, "window_size": window, "chunk_size": chunk}
    tensors = inputs()
    assert_same(learned_eva_attention(*tensors, trained, **where), learned_eva_reference(*tensors, trained, **where))


@pytest.mark.parametrize(("window", "chunk"), [(2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("num_global_tokens", [0, 1])
def test_on_images(window: int, chunk: int, num_global_tokens: int) -> None:
    where = {"grid": (4, 6), "num_global_tokens": num_global_tokens, "window_size": window, "chunk_size": chunk}
    tensors = inputs(24 + num_global_tokens)
    assert_same(learned_eva_attention(*tensors, trained, **where), learned_eva_reference(*tensors, trained, **where))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_untrained_is_eva_with_mean_values(is_causal: bool, overlap: bool) -> None:
    """With values that are alike within a chunk, for which a control variate is the mean too."""
    query, key, value = inputs(24)
    value = value.unflatten(2, (-1, 2))[:, :, :, :1].expand(-1, -1, -1, 2, -1).flatten(2, 3)
    options = {"window_size": 4, "chunk_size": 2, "is_causal": is_causal, "overlap_window": overlap}
    assert_same(
        learned_eva_attention(query, key, value, untrained, **options),
        eva_attention(query, key, value, proposals="key", **options),
    )


@pytest.mark.parametrize("mask", ["right", "left", "holes"])
@pytest.mark.parametrize("options", [{"num_chunks": 3}, {"num_chunks": 5, "overlap_window": True}], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_changes_nothing(mask: str, options: dict[str, int], is_causal: bool) -> None:
    """Also where the chunks' length follows from that of the row, and where chunks are longer than a window."""
    options = {**options, "window_size": 4, "is_causal": is_causal}
    query, key, value = inputs()
    key_mask = MASKS[mask]
    output = learned_eva_attention(query, key, value, trained, key_mask=key_mask, **options)
    for row, real in enumerate(key_mask):
        alone = [z[row : row + 1, :, real] for z in (query, key, value)]
        assert_same(output[row : row + 1, :, real], learned_eva_attention(*alone, trained, **options))
        assert not output[row, :, ~real].any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"chunk_size": 1, "overlap_window": True}], ids=str)
def test_gradients_of_every_tensor(is_causal: bool, options: dict[str, int]) -> None:
    learned = [getattr(trained, name).clone().requires_grad_() for name in SHAPES]
    tensors = [z[:1].requires_grad_() for z in inputs(9)]
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1]]).bool()

    def attention(query: Tensor, key: Tensor, value: Tensor, *found: Tensor) -> Tensor:
        where = {"key_mask": mask, "is_causal": is_causal, "window_size": 2, **options}
        return learned_eva_attention(query, key, value, LearnedSummariser(*found), **where)

    torch.autograd.gradcheck(attention, (*tensors, *learned), fast_mode=True)


def test_gradients_on_an_image() -> None:
    learned = [getattr(trained, name).clone().requires_grad_() for name in SHAPES]
    tensors = [z[:1].requires_grad_() for z in inputs(13)]

    def attention(query: Tensor, key: Tensor, value: Tensor, *found: Tensor) -> Tensor:
        where = {"grid": (3, 4), "num_global_tokens": 1, "window_size": 2, "num_chunks": 4}
        return learned_eva_attention(query, key, value, LearnedSummariser(*found), **where)

    torch.autograd.gradcheck(attention, (*tensors, *learned), fast_mode=True)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("max_chunks", [None, 2])
@pytest.mark.parametrize("scale", [1, 1000])
def test_token_by_token(overlap: bool, max_chunks: int | None, scale: int) -> None:
    """Also with chunks that weigh more than e^1000 times as much as others."""
    options = {"window_size": 4, "chunk_size": 2, "overlap_window": overlap, "max_chunks": max_chunks}
    summaries = replace(trained, key_slope=trained.key_slope * scale)
    query, key, value = inputs()
    expected = learned_eva_attention(query, key, value, summaries, is_causal=True, **options)
    recurrence = learned_eva_recurrence(summaries, scaling=DIM**-0.5, **options)
    state, found = recurrence.start(key, value), []
    for token in range(key.shape[2]):
        one = [z[:, :, token : token + 1] for z in (query, key, value)]
        output, state = recurrence.step(*one, state)
        found.append(output)
    assert_same(torch.cat(found, 2), expected)


@pytest.mark.parametrize("mask", ["none", "holes"])
def test_in_pieces(mask: str) -> None:
    options = {"window_size": 4, "chunk_size": 2}
    query, key, value = inputs()
    key_mask = torch.ones(2, 23).bool() if MASKS[mask] is None else MASKS[mask]
    expected = learned_eva_attention(query, key, value, trained, key_mask=key_mask, is_causal=True, **options)
    recurrence = learned_eva_recurrence(trained, scaling=DIM**-0.5, **options)
    state, found = recurrence.start(key, value), []
    for part in (slice(0, 11), slice(11, 12), slice(12, 23)):
        piece = query[:, :, part], key[:, :, part], value[:, :, part], key_mask[:, part]
        found.append(recurrence.attend(*piece, state))
        state = recurrence.absorb(*piece, state)
    assert_same(torch.cat(found, 2), expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "right", "holes"])
def test_the_start_has_the_mass_of_the_far_keys(is_causal: bool, mask: str) -> None:
    """Whatever else the mass depends on: the offset makes up for it, and is found again."""
    query, key, _ = inputs(64 if mask == "none" else 23, scale=0.8)
    options = {"key_mask": MASKS[mask], "is_causal": is_causal, "window_size": 4, "chunk_size": 2}
    start = eva_learning_start(query, key, trained, **options)
    again = eva_learning_start(query, key, replace(trained, **start), **options)
    torch.testing.assert_close(again, start)
    slope = random(HEADS, DIM, seed=7)
    real = torch.ones(2, 1, key.shape[2], 1) if MASKS[mask] is None else MASKS[mask][:, None, :, None]
    reads = torch.ones_like(real) if not is_causal else real.cumsum(2) > 4  # beyond the first window
    reads = (real * reads).double()
    lifted = eva_learning_start(query, key, replace(trained, far_slope=trained.far_slope + slope), **options)
    mean = (query * DIM**-0.25 * reads).sum((0, 2)) / reads.sum()
    expected = start["far_offset"].double() - (mean * slope).sum(-1)
    torch.testing.assert_close(lifted["far_offset"].double(), expected, atol=1e-4, rtol=1e-4)


def test_the_start_makes_uniform_attention_exact() -> None:
    query, key, value = inputs(32, batch=1)
    query, key = query[:, :, :1].expand_as(query), key[:, :, :1].expand_as(key)
    started = replace(trained, value_pooling=torch.zeros(HEADS, DIM).double())
    started = replace(started, **eva_learning_start(query, key, started, window_size=4))
    ours = learned_eva_attention(query, key, value, started, window_size=4)
    torch.testing.assert_close(ours, value.mean(2, keepdim=True).expand_as(ours), atol=1e-4, rtol=1e-4)


def test_the_start_of_rows_that_fit_into_the_window() -> None:
    query, key, _ = inputs()
    assert not eva_learning_start(query, key, trained, window_size=32)["far_offset"].any()
