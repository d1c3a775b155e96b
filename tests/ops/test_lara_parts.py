"""LARA's landmarks, mixtures and masses: the short ways against the plain ones."""

from __future__ import annotations

import pytest
import torch
from helpers import MASKS, assert_same, inputs, random
from torch import Tensor

from hf_linattn.functional import lara_attention
from hf_linattn.ops.inputs import prepare_tokens
from hf_linattn.ops.lara import attention as lara
from hf_linattn.ops.lara import landmarks, mass
from hf_linattn.ops.lara.attention import IMPORTANCE_WEIGHTINGS
from hf_linattn.ops.lara.features import mixture_log_ratio
from hf_linattn.ops.lara.mixture import log_mixture_at_means
from hf_linattn.ops.lara.parts import (
    Bins,
    IndexedParts,
    OwnTokens,
    Parts,
    Segments,
    grid_bins,
    parts_of,
    segment_index,
)
from hf_linattn.ops.linear_weights import LinearSlotWeights
from hf_linattn.ops.padding import Tokens
from hf_linattn.ops.proposal_map import ResidualMap


def tokens_of(mask: Tensor | None = None, grid: tuple[int, int] | None = None) -> Tokens:
    q, k, v = inputs(grid[0] * grid[1]) if grid else inputs()
    return prepare_tokens(q, k, v, mask, 0.5, is_causal=False, grid=grid)


def plain_parts(tokens: Tokens, count: int) -> IndexedParts:
    """Any parts as an index of their members."""
    if tokens.grid is not None:
        return IndexedParts(grid_bins(tokens.grid, int(count**0.5)))
    longest = tokens.key.shape[2]
    return IndexedParts(segment_index(tokens.lengths, min(count, longest), longest))


def assert_equal_parts(ours: Parts, plain: IndexedParts, z: Tensor) -> None:
    used = torch.ones_like(plain.used) if ours.used is None else ours.used
    assert torch.equal(used.expand_as(plain.used), plain.used)
    there = used.transpose(-1, -2)
    for name in ("mean", "middle"):
        found, expected = ((getattr(parts, name)(z) * there) for parts in (ours, plain))
        assert_same(found, expected)
        assert_same(*(torch.autograd.grad(x.sin().sum(), z)[0] for x in (found, expected)))


# -- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 8, 11, 12, 22, 23, 64])
def test_segments(count: int) -> None:
    tokens = tokens_of()
    parts = parts_of(tokens, count)
    assert isinstance(parts, OwnTokens if count >= 23 else Segments)
    assert_equal_parts(parts, plain_parts(tokens, count), inputs()[0].requires_grad_())


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
@pytest.mark.parametrize("count", [5, 23, 64])
def test_segments_of_padded_rows(mask: str, count: int) -> None:
    tokens = tokens_of(MASKS[mask])
    parts = parts_of(tokens, count)
    assert isinstance(parts, OwnTokens if count >= 23 else IndexedParts)
    assert_equal_parts(parts, plain_parts(tokens, count), tokens.query.clone().requires_grad_())


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 7), (7, 2), (14, 14)])
@pytest.mark.parametrize("count", [1, 4, 10, 36])
def test_bins(grid: tuple[int, int], count: int) -> None:
    tokens = tokens_of(grid=grid)
    parts = parts_of(tokens, count)
    assert isinstance(parts, Bins)
    assert_equal_parts(parts, plain_parts(tokens, count), inputs(grid[0] * grid[1])[0].requires_grad_())


@pytest.mark.parametrize("layout", [{"grid": (1, 23)}, {"grid": None}, {"key_mask": MASKS["holes"]}], ids=str)
@pytest.mark.parametrize("weighting", IMPORTANCE_WEIGHTINGS)
@pytest.mark.parametrize("count", [4, 23])
def test_attention_by_an_index_of_members(
    layout: dict, weighting: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_landmarks": count, "weighting": weighting, "window_size": 3, **layout}

    def run() -> list[Tensor]:
        tensors = [z.requires_grad_() for z in inputs()]
        output = lara_attention(*tensors, **options)
        return [output, *torch.autograd.grad(output.sin().sum(), tensors)]

    short = run()
    monkeypatch.setattr(landmarks, "parts_of", plain_parts)
    for ours, plain in zip(short, run(), strict=True):
        assert_same(ours, plain, atol=1e-10)


def test_a_residual_map_is_what_it_is_in_any_coordinates() -> None:
    q, k, v = inputs()
    adapters = [random(2, 4, 4, seed=seed) * 0.3 for seed in (5, 6)]
    for stage in ("mean", "tokens"):
        options = {"num_landmarks": 5, "window_size": 4, "map_stage": stage, "scaling": 0.3}
        short = lara_attention(
            q, k, v, query_map=ResidualMap(adapters[0]), key_map=ResidualMap(adapters[1]), **options
        )
        maps = [lambda z, a=a: z + z @ a for a in adapters]
        assert_same(short, lara_attention(q, k, v, query_map=maps[0], key_map=maps[1], **options))


# -- densities at the means -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [False, True])
def test_mixture_at_the_means(hidden: bool) -> None:
    mu = random(2, 3, 6, 4).requires_grad_()
    used = torch.tensor([[1, 1, 0, 1, 0, 1], [1] * 6]).bool()[:, None, None] if hidden else None
    ours, expected = log_mixture_at_means(mu, used), mixture_log_ratio(mu, mu, used)[1]
    assert_same(ours, expected)
    assert_same(log_mixture_at_means(mu.detach(), used), expected)
    assert_same(*(torch.autograd.grad(x.sin().sum(), mu)[0] for x in (ours, expected)))
    torch.autograd.gradgradcheck(lambda z: log_mixture_at_means(z, used), (mu,), fast_mode=True)
    grads = torch.func.vmap(torch.func.grad(lambda z: log_mixture_at_means(z, None).sin().sum()))(mu)
    plain = torch.autograd.grad(mixture_log_ratio(mu, mu)[1].sin().sum(), mu)[0]
    assert_same(grads, plain)


def test_mixture_where_no_landmark_is_used() -> None:
    mu = random(1, 1, 3, 4).requires_grad_()
    found = log_mixture_at_means(mu, torch.zeros(1, 1, 1, 3).bool())
    assert (found == float("-inf")).all()
    assert (torch.autograd.grad(found.masked_fill(found.isinf(), 0.0).sum(), mu)[0] == 0).all()


# -- masses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("at_a_time", "piece"), [(1 << 18, 1024), (1, 1024), (1, 5), (200, 7), (300, 23)])
def test_masses_in_pieces_and_by_a_kernel(
    mask: str, at_a_time: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, slots = tokens_of(MASKS[mask]), random(2, 2, 5, 4, seed=2)
    weights = LinearSlotWeights(tokens.key, random(2, 2, 23, 1, seed=3), slots, torch.zeros(2, 2, 5).double())
    probes = random(2, 2, 6, 4, seed=4)
    monkeypatch.setattr(mass, "_AT_A_TIME", at_a_time)
    monkeypatch.setattr(mass, "_PIECE", piece)
    exact, read = mass.masses(probes, tokens, weights)
    logits, log_weights = probes @ tokens.key.mT, weights.masked(tokens.visible).dense().mT
    if tokens.visible is not None:
        logits = logits.masked_fill(~tokens.visible.mT, float("-inf"))
    for found, streamed, expected in zip(
        (exact, read),
        mass.streamed_masses(probes, tokens, weights),
        (logits.logsumexp(-1), log_weights.logsumexp(-1)),
        strict=True,
    ):
        assert_same(found, expected)
        assert_same(streamed, expected)


@pytest.mark.parametrize("weighting", IMPORTANCE_WEIGHTINGS)
@pytest.mark.parametrize("mask", ["none", "holes", "all"])
def test_correction_by_the_definition(weighting: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle token of every landmark: what it finds exactly, minus what it finds through slots."""
    found = []
    real = lara._mass_correction

    def spy(tokens: Tokens, marks: landmarks.Landmarks, query: LinearSlotWeights, key: LinearSlotWeights) -> Tensor:
        middle = plain_parts(tokens, 5).middle
        probes, masks = query.map_tokens(middle), tokens.visible
        exact = probes.tokens @ tokens.key.mT * tokens.root**2
        exact = (exact if masks is None else exact.masked_fill(~masks.mT, float("-inf"))).logsumexp(-1)
        through = (probes.dense() + key.masked(masks).dense().logsumexp(-2).unsqueeze(-2)).logsumexp(-1)
        used = plain_parts(tokens, 5).used.squeeze(-2)
        expected = torch.where(used, exact - through, 0.0).sum(-1) / used.sum(-1).clamp_min(1)
        found.append((real(tokens, marks, query, key), expected[..., None, None]))
        return found[-1][0]

    monkeypatch.setattr(lara, "_mass_correction", spy)
    monkeypatch.setattr(lara, "corrects_mass", lambda *_: False)
    lara_attention(*inputs(), num_landmarks=5, weighting=weighting, window_size=4, key_mask=MASKS[mask])
    assert_same(*found[0])
