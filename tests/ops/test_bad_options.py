"""Options that no attention function can use are refused by name, not computed with."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from hf_linattn.errors import InputError
from hf_linattn.functional import (
    FavorMoments,
    draw_projection,
    eva_attention,
    favor_attention,
    favor_statistics,
    generalized_attention,
    lara_attention,
    softmax_attention,
)

Q, K, V = (torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))
PROJECTION = draw_projection(2, 6, 4, seed=0)


def favor(**options: Any) -> torch.Tensor:
    return favor_attention(Q, K, V, options.pop("projection", PROJECTION), **options)


def lara(**options: Any) -> torch.Tensor:
    return lara_attention(Q, K, V, **options)


def eva(**options: Any) -> torch.Tensor:
    return eva_attention(Q, K, V, **options)


@pytest.mark.parametrize("attention", [favor, lara, eva])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("window_size", [-3, 2.0, True, 2**63, 2**64, math.nan]),
        ("num_global_tokens", [-1, -2, 1.0, 2**40, 2**64]),
        ("slot_dropout", [1.0, 1.5, -0.1, math.nan, math.inf]),
        ("scaling", [0, -1.0, math.nan, math.inf, 1e300, 1e-300]),
    ],
)
def test_shared_options(attention: Any, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InputError, match=f"{name} must be.*{re.escape(repr(value))}"):
            attention(**{name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: favor(num_heavy_keys=-1), "num_heavy_keys"),
        (lambda: favor(projection=torch.zeros(2, 0, 4)), "projection must be"),
        (lambda: favor(grid=(3, 3)), "needs 9 tokens"),
        (
            lambda: favor(statistics=favor_statistics(Q[:, [0, 0, 1]], K[:, [0, 0, 1]])),
            "statistics must be those of 2 heads",
        ),
        (lambda: favor_statistics(Q, K, key_mask=torch.ones(1, 5).bool()), "key_mask must be"),
        (lambda: favor_statistics(Q, K[..., :2]), "query and key must agree"),
        (lambda: lara(num_landmarks=0), "num_landmarks"),
        (lambda: lara(alpha_coeff=-1.0), "alpha_coeff"),
        (lambda: lara(alpha_coeff=1e300), "alpha_coeff must be a finite number.*1e.300"),
        (
            lambda: lara(num_landmarks=2**64),
            "num_landmarks must be an integer >= 1 and <= 1048576; got 18446744073709551616",
        ),
        (lambda: lara(num_landmarks=-(2**64)), "num_landmarks must be an integer >= 1"),
        (lambda: lara(samples_per_landmark=2**70), "samples_per_landmark must be an integer >= 1 and <= 1048576"),
        (lambda: lara(samples_per_landmark=2**19, noise=True), "samples_per_landmark . landmarks must be"),
        (lambda: lara(num_heavy_keys=2**63), "num_heavy_keys must be an integer >= 0 and <= 1048576"),
        (lambda: favor(chunk_size=2**70), "chunk_size must be an integer >= 1 and <= 1048576"),
        (lambda: eva(num_chunks=2**64), "num_chunks must be an integer >= 1 and <= 1048576"),
        (lambda: eva(num_chunks=math.inf), "num_chunks must be an integer >= 1; got inf"),
        (lambda: eva(chunk_size=2**63), "chunk_size must be an integer >= 1 and <= 1048576"),
        (lambda: eva(max_chunks=2**40, is_causal=True), "max_chunks must be an integer >= 1 and <= 1048576"),
        (lambda: generalized_attention(Q, K, V, PROJECTION, kernel_epsilon=1e300), "kernel_epsilon must be a finite"),
        (lambda: draw_projection(2, 2**40, 4, seed=0), "num_features must be an integer >= 1 and <= 1048576"),
        (lambda: draw_projection(2, 6, -4, seed=0), "head_dim must be an integer >= 1; got -4"),
        (lambda: draw_projection(2, 6, 4, seed=2**70), "seed must be an integer from -2..63 to 2..64 - 1; got 1180"),
        (lambda: draw_projection(2, 6, 4, seed=math.nan), "seed must be an integer .*got nan"),
        (lambda: lara(num_landmarks=3, noise=torch.zeros(1, 1, 3, 4)), "noise must be"),
        (lambda: softmax_attention(Q, K, V, scaling=math.inf), "scaling must be a finite number"),
    ],
)
def test_options_of_one_function(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_a_causal_function_refuses_statistics_of_its_own_row() -> None:
    """Their gradient is 0 by design, so only the values would show that later tokens are in them."""
    for variant in ("saderf", "dense"):
        statistics = favor_statistics(Q, K, variant=variant)
        with pytest.raises(InputError, match="FavorMoments"):
            favor(statistics=statistics, is_causal=True)
        other = FavorMoments.empty(2, 4).update(V, Q).statistics(variant)
        favor(statistics=other, is_causal=True)


def test_dtypes_may_differ() -> None:
    for attend in (favor_attention, lara_attention, eva_attention):
        extra = (PROJECTION,) if attend is favor_attention else ()
        expected = attend(Q.bfloat16().float(), K, V.half().float(), *extra)
        ours = attend(Q.bfloat16(), K, V.half(), *extra)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), expected, rtol=0, atol=2e-2)


def test_impossible_directions() -> None:
    with pytest.raises(InputError, match="num_features must be an integer >= 1; got 0"):
        draw_projection(2, 0, 4, seed=0)
    with pytest.raises(InputError, match="must be CalibratedProposals"):
        lara(proposals=torch.zeros(2, 3, 4))
