"""LARA's published options against the official implementation (see `tests/golden/README.md`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from hf_linattn.functional import lara_attention, randomized_attention

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = {
    "lara_optimal": {"num_landmarks": 8, "weighting": "optimal"},
    "lara_grid_balance": {"num_landmarks": 9, "grid": (5, 7)},
    "lara_grid_mixed": {"num_landmarks": 4, "grid": (4, 6), "weighting": "optimal", "mixing": "key_value"},
    "lara_tokens_clamp": {
        "num_landmarks": 12,
        "weighting": "optimal",
        "alpha_coeff": 8.0,
        "map_stage": "tokens",
    },
    "lara_biased_samples": {
        "num_landmarks": 4,
        "weighting": "biased",
        "samples_per_landmark": 2,
        "map_stage": "tokens",
    },
    "lara_antithetic": {"num_landmarks": 6, "weighting": "optimal", "antithetic": True, "map_stage": "tokens"},
}


def load(name: str) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Callable[[Tensor], Tensor]]]:
    data = load_file(GOLDEN / f"{name}.safetensors")
    return (
        data,
        [data[name].requires_grad_() for name in ("query", "key", "value")],
        {f"{side}_map": linear_norm(data, side) for side in ("query", "key") if f"{side}_map_weight" in data},
    )


def linear_norm(data: dict[str, Tensor], side: str) -> Callable[[Tensor], Tensor]:
    weight, bias, *norm = (data[f"{side}_{n}"] for n in ("map_weight", "map_bias", "norm_weight", "norm_bias"))
    return lambda z: F.layer_norm(F.linear(z, weight, bias), z.shape[-1:], *norm)


def assert_same(ours: Tensor, expected: Tensor, what: str) -> None:
    error = float((ours - expected).detach().norm() / expected.norm())
    assert error < 1e-12, f"{what}: relative error {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_evaluation(name: str) -> None:
    data, inputs, maps = load(name)
    out = lara_attention(*inputs, **CASES[name], **maps)
    assert_same(out, data["out"], "output")
    if "cotangent" in data:
        grads = torch.autograd.grad((out * data["cotangent"]).sum(), inputs)
        for grad, which in zip(grads, ("query", "key", "value"), strict=True):
            assert_same(grad, data[f"grad_{which}"], f"gradient of the {which}")


@pytest.mark.parametrize("name", [name for name in CASES if name != "lara_tokens_clamp"])
def test_training(name: str) -> None:
    data, inputs, maps = load(name)
    out = lara_attention(*inputs, noise=data["noise"], noise_scale="published", **CASES[name], **maps)
    assert_same(out, data["out_with_noise"], "output")


@pytest.mark.parametrize("proposal", ["softmax_mean", "mean"])
def test_randomized_attention(proposal: str) -> None:
    data, inputs, _ = load(f"ra_{proposal}")
    out = randomized_attention(*inputs, proposal=proposal, noise=data["noise"], noise_scale="published")
    assert_same(out, data["out"], "output")
