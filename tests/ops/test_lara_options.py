"""LARA's options (published ones above all), in every combination, against the row-by-row reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import naive
import pytest
import torch
from helpers import MASKS, assert_same, inputs, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.functional import lara_attention, softmax_attention
from hf_linattn.ops.lara import attention as lara
from hf_linattn.ops.lara.attention import IMPORTANCE_WEIGHTINGS

pytestmark = pytest.mark.usefixtures("road")


def squash(shift: float) -> Callable[[Tensor], Tensor]:
    """A map that is not linear, so that it matters where and in which coordinates it is applied; `0 -> shift`."""
    return lambda z: torch.tanh(z) * 1.3 + shift


option_cases = st.fixed_dictionaries(
    {
        "landmarks": st.sampled_from([1, 3, 4, 9, 40]),
        "weighting": st.sampled_from(IMPORTANCE_WEIGHTINGS),
        "alpha_coeff": st.sampled_from([0.0, 1.0, 8.0]),
        "mixing": st.sampled_from(["none", "key", "key_value"]),
        "map_stage": st.sampled_from([None, "mean", "tokens"]),
        "samples": st.integers(1, 3),
        "antithetic": st.booleans(),
        "noise_scale": st.sampled_from([None, "corrected", "published"]),
        "scaling": st.sampled_from([None, 0.8]),
        "window": st.sampled_from([0, 0, 3]),
        "count": st.sampled_from([0, 0, 1]),
        "layout": st.sampled_from(["none", "right", "holes", "grid"]),
    }
)


@given(case=option_cases)
@settings(max_examples=150, derandomize=True, database=None)
def test_every_option_of_lara(case: dict) -> None:
    q, k, v = inputs()
    layout = {"grid": (2, 11) if case["count"] else (23, 1)} if case["layout"] == "grid" else {}
    mask = MASKS.get(case["layout"])
    landmarks, scaling = case["landmarks"], case["scaling"]
    used = int(landmarks**0.5) ** 2 if layout else min(landmarks, 23 - case["count"])
    noise = random(2, 2, case["samples"] * used, 4, seed=7) if case["noise_scale"] else None
    root = (4**-0.5 if scaling is None else scaling) ** 0.5
    factor = root if case["noise_scale"] == "published" else 1.0
    shared = {name: case[name] for name in ("weighting", "alpha_coeff", "mixing", "antithetic")} | layout
    maps = {"query_map": squash(0.2), "key_map": squash(-0.4)} if case["map_stage"] else {}
    ours = lara_attention(
        q,
        k,
        v,
        num_landmarks=landmarks,
        key_mask=mask,
        scaling=scaling,
        map_stage=case["map_stage"] or "mean",
        samples_per_landmark=case["samples"],
        noise=False if noise is None else noise,
        noise_scale=case["noise_scale"] or "corrected",
        window_size=case["window"],
        num_global_tokens=case["count"],
        **shared,
        **maps,
    )

    def of_row(b: int, h: int) -> dict:
        if noise is None:
            return {}
        real = 23 if mask is None else int(mask[b].sum())
        mine = used if layout else min(landmarks, max(real - case["count"], 0))
        rows = noise[b, h].view(case["samples"], used, 4)[:, :mine] * factor
        return {"noise": rows.flatten(0, 1)}

    expected = naive.per_row(
        naive.lara,
        q,
        k,
        v,
        mask,
        scaling=scaling,
        per_head=[of_row],
        landmarks=landmarks,
        map_tokens=case["map_stage"] == "tokens",
        samples=case["samples"],
        window=case["window"],
        num_global=case["count"],
        **{name: lambda z, m=m: m(z / root) * root for name, m in maps.items()},
        **shared,
    )
    assert_same(ours, expected)


def test_heavy_keys_alone_put_the_slots_beside_exact_ones() -> None:
    q, k, v = inputs()
    for weighting in IMPORTANCE_WEIGHTINGS:
        options = {"num_landmarks": 5, "weighting": weighting, "num_heavy_keys": 4}
        plain = lara_attention(q, k, v, **options)
        heavy_alone, slots_alone = (
            lara_attention(q, k, v, offset=torch.tensor([s, s]), **options) for s in (-1e4, 1e4)
        )
        share = (plain - slots_alone) / (heavy_alone - slots_alone)  # of the heavy keys, the same for all values
        assert_same(share, share[..., :1].expand_as(share))
        assert share.min() > 1e-4
        assert share.max() < 1 - 1e-4
        # The correction: on average over the probes the slots weigh what the keys in them do.
        exact = softmax_attention(q, k, v)
        assert (plain - exact).norm() < (lara_attention(q, k, v, num_landmarks=5) - exact).norm()


def test_several_samples_change_nothing_without_noise() -> None:
    q, k, v = inputs()
    for weighting in IMPORTANCE_WEIGHTINGS:
        plain = lara_attention(q, k, v, num_landmarks=5, weighting=weighting, window_size=4)
        more = lara_attention(
            q, k, v, num_landmarks=5, weighting=weighting, window_size=4, samples_per_landmark=3, antithetic=True
        )
        assert torch.equal(plain, more)


@pytest.mark.parametrize("options", [{}, {"samples_per_landmark": 3}, {"antithetic": True}, {"weighting": "optimal"}])
def test_noise_puts_the_slots_on_the_scale_of_exact_keys(options: dict) -> None:
    # All values 0 but those of the query's own window: the output is the share of the window, whose expectation is
    # only right if the slots' mass is.
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, 1, 12, 4, generator=generator, dtype=torch.float64) * 0.5 for _ in range(2))
    inside = (torch.arange(12) // 3)[:, None] == (torch.arange(12) // 3)[None]
    dots = (q[0, 0] @ k[0, 0].T) * 0.5
    exact = torch.logsumexp(dots.masked_fill(inside, -torch.inf), -1)
    near = torch.logsumexp(dots.masked_fill(~inside, -torch.inf), -1)
    many = 6000
    torch.manual_seed(1)
    masses = []
    for block in range(4):
        v = torch.zeros(1, 1, 12, 1, dtype=torch.float64)
        v[:, :, 3 * block : 3 * block + 3] = 1.0
        share = lara_attention(
            *(z.expand(many, -1, -1, -1) for z in (q, k, v)), num_landmarks=4, window_size=3, noise=True, **options
        )[:, 0, 3 * block : 3 * block + 3, 0]
        masses.append((1 / share - 1) * near[3 * block : 3 * block + 3].exp())  # of the slots, from the share
    mass = torch.cat(masses, -1)
    z = (mass.mean(0) - exact.exp()) / (mass.std(0) / many**0.5)
    limit = 4.5  # 12 tests: a right estimator fails in fewer than 1e-4 of all seeds
    if options.get("weighting") == "optimal":  # clamped at 0, and so above the exact mass by a little
        assert ((mass.mean(0) / exact.exp()).log().abs() < 0.2).all()
    else:
        assert z.abs().max() < limit, z


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [0, 2])
def test_gradients_of_every_option(masked: bool, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lara, "_mass_correction", lambda *_: torch.tensor(0.8, dtype=torch.float64))
    monkeypatch.setattr(lara, "corrects_mass", lambda *_: False)
    q, k, v = (z[:1, :1, :7, :2].clone().requires_grad_() for z in inputs())
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1]]).bool() if masked else None
    noise = random(1, 1, 6, 2, seed=7)
    for weighting, mixing in itertools.product(IMPORTANCE_WEIGHTINGS, ("none", "key", "key_value")):
        for extra in ({}, {"noise": noise, "samples_per_landmark": 2}, {"noise": noise[:, :, :3], "antithetic": True}):
            options = {"weighting": weighting, "mixing": mixing, "num_landmarks": 3, "window_size": window, **extra}
            maps = {"query_map": squash(0.2), "key_map": squash(-0.4), "map_stage": "tokens"}
            torch.autograd.gradcheck(
                lambda *z, o=options, m=maps: lara_attention(*z, key_mask=mask, **o, **m), (q, k, v), fast_mode=True
            )


def test_row_without_landmarks_is_finite_under_every_option() -> None:
    q, k, v = (z.requires_grad_() for z in inputs())
    for weighting, mixing in itertools.product(IMPORTANCE_WEIGHTINGS, ("none", "key", "key_value")):
        out = lara_attention(
            q,
            k,
            v,
            key_mask=torch.tensor([[0] * 23, [1] * 23]).bool(),
            weighting=weighting,
            mixing=mixing,
            noise=random(2, 2, 23, 4, seed=7),
            query_map=squash(0.2),
            map_stage="tokens",
        )
        assert (out[0] == 0).all()
        for grad in torch.autograd.grad(out.sin().sum(), (q, k, v)):
            assert grad.isfinite().all()
            assert (grad[0] == 0).all()
