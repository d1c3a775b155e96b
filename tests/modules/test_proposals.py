"""Learned maps of landmarks and chunks: what they compute, and where they start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_linattn.modules.base import LayerShape
from hf_linattn.modules.proposal_maps import PROPOSAL_MAPS, proposal_maps, proposal_spec

SHAPE = LayerShape(num_heads=3, head_dim=4)
MEANS = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))


def state(name: str, *, random: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    spec = proposal_spec(name, "query", SHAPE)
    if random:
        return {key: torch.randn(tensor.shape, generator=generator) for key, tensor in spec.items()}
    return {key: tensor.draw() for key, tensor in spec.items()}


def test_without_a_map_there_is_nothing() -> None:
    assert state("none", random=False) == {}
    assert proposal_maps({})[0] is None


@pytest.mark.parametrize("name", [name for name in PROPOSAL_MAPS if name != "none"])
def test_the_start_is_the_identity_before_a_norm(name: str) -> None:
    run = proposal_maps(state(name, random=False))[0]
    assert run is not None
    expected = MEANS
    if name == "linear_norm":
        expected = nn.functional.layer_norm(MEANS, (4,))
    if name == "dense_norm":
        joint = MEANS.transpose(1, 2).reshape(2, 5, 12)
        expected = nn.functional.layer_norm(joint, (12,)).reshape(2, 5, 3, 4).transpose(1, 2)
    torch.testing.assert_close(run(MEANS), expected)


@pytest.mark.parametrize("name", ["linear", "linear_norm", "dense_norm"])
def test_trained_maps_are_those_of_torch(name: str) -> None:
    tensors = state(name, random=True)
    run = proposal_maps(tensors)[0]
    assert run is not None
    width = 12 if name == "dense_norm" else 4
    linear = nn.Linear(width, width)
    norm = nn.Identity() if name == "linear" else nn.LayerNorm(width)
    with torch.no_grad():
        linear.weight.copy_(tensors["query_map_weight"])
        linear.bias.copy_(tensors["query_map_bias"])
        if isinstance(norm, nn.LayerNorm):
            norm.weight.copy_(tensors["query_norm_weight"])
            norm.bias.copy_(tensors["query_norm_bias"])
    for row in range(2):
        for place in range(5):
            heads = MEANS[row, :, place]  # channel = head * head_dim + coordinate
            expected = norm(linear(heads.reshape(-1))).reshape(3, 4) if width == 12 else norm(linear(heads))
            torch.testing.assert_close(run(MEANS)[row, :, place], expected)


def test_each_head_has_its_own_residual_map() -> None:
    tensors = state("residual", random=True)
    run = proposal_maps(tensors)[0]
    assert run is not None
    for head in range(3):
        expected = MEANS[:, head] + MEANS[:, head] @ tensors["query_adapter"][head]
        torch.testing.assert_close(run(MEANS)[:, head], expected)
