"""Overlapping windows and heavy keys of FAVOR and LARA, against loops over single queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import (
    draw_projection,
    favor_attention,
    favor_log_features,
    lara_attention,
    softmax_attention,
)
from hf_linattn.kernels.attention_state import AttentionState, merge_states
from hf_linattn.ops.dense_slots import states_around
from hf_linattn.ops.heavy_keys import key_importance
from hf_linattn.ops.inputs import prepare_tokens

DIM = 4
PROJECTION = draw_projection(2, 5, DIM, seed=1).double()


def draw(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, tokens, DIM, generator=generator, dtype=torch.float64) for _ in range(3))


def heaviest(x: Tensor, y: Tensor, number: int) -> set[int]:
    mean, variance = x.mean(0), x.var(0, unbiased=False)
    score = y @ mean + y.square() @ variance / 2
    return set(score.argsort(descending=True, stable=True)[:number].tolist())


def slowly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, is_causal: bool, window: int, overlap: bool, heavy: int
) -> Tensor:
    """FAVOR+ one query at a time: exact weights near it and for heavy keys, feature products elsewhere."""
    x, y, out = q * DIM**-0.25, k * DIM**-0.25, torch.zeros_like(v)
    a, c = favor_log_features(x, y, PROJECTION)
    for row in range(q.shape[0]):
        real = mask[row].nonzero().squeeze(-1)
        for head in range(2):
            xs, ys, vs = (z[row, head, real] for z in (x, y, v))
            chosen = heaviest(xs, ys, heavy) if heavy and len(real) else set()
            for t in range(len(real)):
                start = t // window * window if window else 0
                first, end = start, start + window
                if overlap:
                    first, end = (start - window, end) if is_causal else (start - window // 2, end + window // 2)
                logits = torch.full((len(real),), float("-inf"), dtype=v.dtype)
                for n in range(len(real)):
                    if is_causal and n > t:
                        continue
                    exact = n in chosen or first <= n < end
                    through = (a[row, head, real[t]] + c[row, head, real[n]]).logsumexp(0)
                    logits[n] = xs[t] @ ys[n] if exact else through
                out[row, head, real[t]] = logits.softmax(0) @ vs
    return out


CASES = [
    pytest.param(is_causal, window, overlap, heavy, id=f"{'causal-' * is_causal}{window}{'+' * overlap}-heavy{heavy}")
    for is_causal in (False, True)
    for window, overlap in ((0, False), (3, False), (2, True), (4, True), (6, True))
    for heavy in (0, 1, 3)
    if not (is_causal and heavy)
]


@pytest.mark.parametrize(("is_causal", "window", "overlap", "heavy"), CASES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 9, 20])
def test_windows_against_loops(is_causal: bool, window: int, overlap: bool, heavy: int, tokens: int) -> None:
    q, k, v = draw(2, tokens)
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(tokens)) > 0.3
    options: dict[str, Any] = {"is_causal": is_causal, "window_size": window, "overlap_window": overlap}
    ours = favor_attention(q, k, v, PROJECTION, key_mask=mask, num_heavy_keys=heavy, chunk_size=4, **options)
    expected = slowly(q, k, v, mask, is_causal=is_causal, window=window, overlap=overlap, heavy=heavy)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_many_blocks_use_the_scan(is_causal: bool) -> None:
    q, k, v = draw(1, 80)
    mask = torch.ones(1, 80, dtype=torch.bool)
    ours = favor_attention(q, k, v, PROJECTION, is_causal=is_causal, window_size=2, overlap_window=True)
    expected = slowly(q, k, v, mask, is_causal=is_causal, window=2, overlap=True, heavy=0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@given(blocks=st.integers(1, 70), readers=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_states_around_is_a_merge(blocks: int, readers: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = AttentionState(
        torch.randn(blocks, 3, 2, generator=generator, dtype=torch.float64),
        torch.randn(blocks, 3, generator=generator, dtype=torch.float64),
    )
    before = torch.randint(-1, blocks, (readers,), generator=generator)
    after = before.clamp_min(0) + torch.randint(1, 4, (readers,), generator=generator)
    ours = states_around(states, before, after)
    for reader in range(readers):
        seen = [k for k in range(blocks) if k < before[reader] or k >= after[reader]]
        if not seen:
            assert bool((ours.lse[reader] == float("-inf")).all())
            continue
        expected = merge_states([AttentionState(states.output[k], states.lse[k]) for k in seen])
        torch.testing.assert_close(ours.output[reader], expected.output, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.lse[reader], expected.lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["favor", "lara"])
@pytest.mark.parametrize("options", [{"overlap_window": True, "window_size": 4}, {"num_heavy_keys": 3}])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("entry", ["one direction", pytest.param("every entry", marks=pytest.mark.slow)])
def test_gradients_of_windows(attention: str, options: dict[str, Any], masked: bool, entry: str) -> None:
    """Along one random direction a wrong entry shows with probability one."""
    q, k, v = (z.requires_grad_() for z in draw(1, 11))
    mask = torch.arange(11)[None] != 4 if masked else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if attention == "favor":
            return favor_attention(q, k, v, PROJECTION, key_mask=mask, **options)
        # With noise, or the correction of the mass (which carries no gradient) would be differentiated numerically.
        noise = torch.ones(1, 2, 3, DIM, dtype=torch.float64) / 3
        return lara_attention(q, k, v, num_landmarks=3, key_mask=mask, noise=noise, **options)

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=entry == "one direction")


@pytest.mark.parametrize("attention", ["favor", "lara"])
def test_all_keys_heavy_is_softmax(attention: str) -> None:
    q, k, v = draw(2, 9)
    for window in (0, 4):
        options: dict[str, Any] = {"num_heavy_keys": 9, "window_size": window}
        ours = lara_attention(q, k, v, **options)
        if attention == "favor":
            ours = favor_attention(q, k, v, PROJECTION, **options)
        torch.testing.assert_close(ours, softmax_attention(q, k, v), rtol=0, atol=1e-12)


def test_importance_is_the_log_mean_weight_of_gaussian_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 200_000, DIM, generator=generator, dtype=torch.float64) * 0.5 + 0.3
    y = torch.zeros_like(x)
    y[:, :, :5] = torch.randn(1, 1, 5, DIM, generator=generator, dtype=torch.float64)
    score = key_importance(prepare_tokens(x, y, y, None, scaling=1.0, is_causal=False))[0, 0, :5]
    weights = (x[0, 0] @ y[0, 0, :5].T).exp()
    error = (score.exp() - weights.mean(0)) / (weights.std(0) / 200_000**0.5)
    assert float(error.abs().max()) < 5  # standard errors: a chance of 3e-6 for five keys


def test_global_tokens_heavy_keys_and_window_share_one_softmax() -> None:
    q, k, v = draw(1, 12)
    options: dict[str, Any] = {"window_size": 4, "num_heavy_keys": 7, "num_global_tokens": 1}
    ours = favor_attention(q, k, v, PROJECTION, **options)
    torch.testing.assert_close(ours[:, :, 0], softmax_attention(q, k, v)[:, :, 0], rtol=0, atol=1e-12)
    constant = favor_attention(q, k, torch.ones_like(v), PROJECTION, **options)
    torch.testing.assert_close(constant, torch.ones_like(v), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (InputError, {"window_size": 3, "overlap_window": True}, "even window_size >= 2; got 3"),
        (InputError, {"window_size": 0, "overlap_window": True}, "even window_size >= 2; got 0"),
        (InputError, {"num_heavy_keys": -1}, "num_heavy_keys must be an integer >= 0; got -1"),
        (UnsupportedError, {"num_heavy_keys": 2, "is_causal": True}, "every query would learn about later tokens"),
        (UnsupportedError, {"window_size": 2, "overlap_window": True, "grid": (3, 4)}, "not on a grid"),
    ],
)
def test_what_cannot_be_done_raises(error: type[Exception], options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        favor_attention(*draw(1, 12), PROJECTION, **options)
