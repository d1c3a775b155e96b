"""Against numbers from the official implementations and the epsilon-free formula (see `tests/golden/README.md`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_linattn.functional import favor_attention, lara_attention, randomized_attention

GOLDEN = Path(__file__).parents[1] / "golden"
LARA = {
    "lara_grid_balance": {"num_landmarks": 9, "grid": (5, 7), "weighting": "balance"},
    "lara_optimal": {"num_landmarks": 8, "weighting": "optimal"},
}


def load(name: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    data = load_file(GOLDEN / f"{name}.safetensors")
    if "noise" in data:
        data["noise"] = data["noise"] * data["query"].shape[-1] ** -0.25
    return data, [data[name].requires_grad_() for name in ("query", "key", "value")]


def assert_same(ours: Tensor, expected: Tensor, what: str) -> None:
    error = float((ours - expected).detach().norm() / expected.norm())
    assert error < 1e-10, f"{what}: relative error {error:.1e}"


def check(name: str, attention: Callable[..., Tensor], **settings: object) -> None:
    data, inputs = load(name)
    mask = data.get("key_mask")
    keep = torch.ones_like(data["out"]) if mask is None else mask[:, None, :, None].expand_as(data["out"])
    out = attention(*inputs, key_mask=mask, **settings)
    assert_same(out, data["out"] * keep, "output")
    grads = torch.autograd.grad((out * data["cotangent"]).sum(), inputs)
    for grad, which in zip(grads, ("query", "key", "value"), strict=True):
        assert_same(grad, data[f"grad_{which}"], f"gradient of the {which}")


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [
        ("favor_padded_outlier_keys", False),
        ("favor_causal_growing_keys", True),
        ("favor_causal_left_padding", True),
        ("favor_causal_shared_projection", True),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_favor_plus_without_epsilon(name: str, is_causal: bool, chunk_size: int) -> None:
    check(name, favor_attention, projection=load(name)[0]["projection"], is_causal=is_causal, chunk_size=chunk_size)


@pytest.mark.parametrize("proposal", ["softmax_mean", "mean"])
def test_randomized_attention(proposal: str) -> None:
    name = f"ra_{proposal}"
    check(name, randomized_attention, proposal=proposal, noise=load(name)[0]["noise"])


@pytest.mark.parametrize("name", LARA)
def test_lara(name: str) -> None:
    check(name, lara_attention, **LARA[name])


@pytest.mark.parametrize("name", LARA)
def test_lara_with_noise(name: str) -> None:
    data, inputs = load(name)
    assert_same(lara_attention(*inputs, noise=data["noise"], **LARA[name]), data["out_with_noise"], "output")


def test_the_files_stay_small() -> None:
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 250_000
