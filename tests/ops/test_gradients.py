"""Gradients against finite differences in float64, for every kind x mask x window x global tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from variants import VARIANTS, Variant, directions, fixed_statistics, name_of

from hf_linattn.functional import (
    eva_attention,
    favor_attention,
    favor_statistics,
    lara_attention,
    randomized_attention,
    softmax_attention,
)
from hf_linattn.ops.lara import attention as lara

pytestmark = pytest.mark.usefixtures("road")

# Statistics of the row itself carry no gradient, which finite differences cannot know.
FIXED = [v for v in VARIANTS if v.name not in ("favor_sharp", "favor_sharp-dense")]
TOKENS = 7
MASK = torch.tensor([[0, 1, 1, 0, 1, 1, 1]]).bool()


def inputs(tokens: int = TOKENS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (1, 1, tokens, 2)
    return [(torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(3)]


def check(function: object, *tensors: Tensor) -> None:
    # One random direction of the inputs and outputs: a wrong entry of the Jacobian shows with probability one.
    torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.fixture(autouse=True)
def _no_mass_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    """LARA's correction carries no gradient by design, which finite differences cannot know: make it a constant."""
    monkeypatch.setattr(lara, "_mass_correction", lambda *_: torch.tensor(0.8, dtype=torch.float64))
    monkeypatch.setattr(lara, "corrects_mass", lambda *_: False)


@pytest.mark.parametrize("attend", FIXED, ids=name_of)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [0, 1, 2, 4, 8])
def test_gradcheck_of_every_kind(attend: Variant, masked: bool, window: int) -> None:
    mask = MASK if masked else None
    for count in (0,) if attend.is_causal else (0, 1, 2):
        options = {"key_mask": mask, "window_size": window}
        if count:
            options["num_global_tokens"] = count
        check(lambda q, k, v, options=options: attend(q, k, v, **options), *inputs())


@pytest.mark.parametrize("window", [1, 2])
def test_gradcheck_on_images(window: int) -> None:
    options = {"grid": (2, 3), "num_global_tokens": 1, "window_size": window}
    for attend in (v for v in FIXED if not v.is_causal):
        check(lambda q, k, v, attend=attend: attend(q, k, v, **options), *inputs())


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck_of_the_references(is_causal: bool) -> None:
    noise = torch.randn(1, 1, TOKENS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mask in (None, MASK):
        options = {"is_causal": is_causal, "key_mask": mask}
        check(lambda q, k, v, options=options: softmax_attention(q, k, v, **options), *inputs())
        for proposal in ("softmax_mean", "mean"):
            check(
                lambda q, k, v, options=options, proposal=proposal: randomized_attention(
                    q, k, v, noise=noise, proposal=proposal, **options
                ),
                *inputs(),
            )


@pytest.mark.parametrize("masked", [False, True])
def test_learned_maps_and_offset(masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(1, 2, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    offset = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    mask = MASK if masked else None

    def with_lara(q, k, v, a, b, offset, weighting):
        maps = {"query_map": lambda z: z @ a, "key_map": lambda z: z @ b}
        return lara_attention(
            q, k, v, num_landmarks=3, weighting=weighting, key_mask=mask, window_size=2, offset=offset, **maps
        )

    def with_eva(q, k, v, a, b, is_causal, chunks):
        maps = {"query_map": lambda z: z @ a, "key_map": lambda z: z @ b}
        options = {"window_size": 2, "num_chunks": chunks, "chunk_size": 2, "is_causal": is_causal, "key_mask": mask}
        return eva_attention(q, k, v, weighting="spread", **options, **maps)

    for weighting in ("balance", "optimal"):
        check(lambda *z, w=weighting: with_lara(*z, w), *inputs(), *maps, offset)
    for is_causal, chunks in itertools.product((False, True), (4, 2, 1)):
        check(lambda *z, i=is_causal, c=chunks: with_eva(*z, i, c), *inputs(), *maps)


def test_favor_in_cross_attention_and_towards_the_directions() -> None:
    q, _, _ = inputs(4)
    _, k, v = inputs()
    w = directions(1, 2).clone().requires_grad_()
    statistics = fixed_statistics(1, 2)
    check(lambda q, k, v, w: favor_attention(q, k, v, w, statistics=statistics, key_mask=MASK), q, k, v, w)
    q, k, v = inputs()
    for window, is_causal in itertools.product((0, 2), (False, True)):
        options = {"window_size": window, "is_causal": is_causal, "chunk_size": 2, "statistics": statistics}
        check(lambda q, k, v, w, options=options: favor_attention(q, k, v, w, **options), q, k, v, w)


def test_statistics_and_correction_carry_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    statistics = favor_statistics(q, k)
    assert not any(s.requires_grad for s in statistics)
    monkeypatch.undo()
    seen = []
    real = lara._mass_correction
    monkeypatch.setattr(lara, "_mass_correction", lambda *a: seen.append(real(*a)) or seen[-1])
    monkeypatch.setattr(lara, "corrects_mass", lambda *_: False)
    lara_attention(q, k, v, num_landmarks=3, window_size=2).sum().backward()
    assert not seen[0].requires_grad
    assert seen[0].shape == (1, 1, 1, 1)
    assert q.grad.isfinite().all()
