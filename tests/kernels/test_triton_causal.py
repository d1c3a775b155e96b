"""Causal attention through slots in Triton against the portable form in float64, with all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hf_linattn.kernels.attention_state import AttentionState
from hf_linattn.kernels.causal_slots import torch_kernel as portable
from hf_linattn.kernels.causal_slots.triton_launch import causal_backward, causal_forward
from hf_linattn.kernels.slot_inputs import SlotInputs

INF = float("inf")


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def case(groups: int, tokens: int, slots: int, dim: int, width: int) -> list[Tensor]:
    shapes = [(groups, tokens, dim), (groups, tokens), (groups, slots, dim), (groups, slots)] * 2
    query, _, *others = (random(*shape, seed=i) for i, shape in enumerate(shapes))
    return [query, *others, random(groups, tokens, width, seed=9)]


def check(inputs: list[Tensor], limit: float, device: str = "cpu") -> None:
    inputs = SlotInputs(*(z.to(device) for z in inputs))
    grads = AttentionState(*(random(*inputs.value.shape[:n], seed=13 - n).to(device) for n in (3, 2)))
    results, wide = causal_forward(inputs, 32), SlotInputs(*(z.double() for z in inputs))
    expected = portable.causal_forward(wide, 32)
    assert [z.shape for z in results] == [z.shape for z in expected]
    empty = expected[1] == -INF
    clean = AttentionState(grads.output.double(), grads.lse.double().masked_fill(empty, 0.0))
    found = [*results[:2], *causal_backward(grads, inputs, results, [True] * 8, 32)]
    exact = [*expected[:2], *portable.causal_backward(clean, wide, expected, [True] * 8, 32)]
    for number, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert not a.isnan().any(), number
        torch.testing.assert_close(a.double(), b, rtol=limit, atol=limit, msg=lambda m, n=number: f"{n}: {m}")


@pytest.mark.parametrize("tokens", [1, 65, *(pytest.param(n, marks=pytest.mark.slow) for n in (63, 64, 200))])
def test_matches_the_portable_form(tokens: int) -> None:
    check(case(2, tokens, 5, 4, 3), 5e-5)


def test_triton_causal_with_masked_keys() -> None:
    inputs = case(2, 100, 5, 4, 3)
    inputs[4][0, :70] = inputs[4][1, 60:] = -INF
    check(inputs, 5e-5)


def test_only_what_is_needed() -> None:
    inputs = SlotInputs(*case(1, 40, 3, 4, 2))
    results = causal_forward(inputs, 32)
    grads = AttentionState(random(1, 40, 2, seed=10), random(1, 40, seed=11))
    whole = causal_backward(grads, inputs, results, [True] * 8, 32)
    for index in range(8):
        needs = [i == index for i in range(8)]
        found = causal_backward(grads, inputs, results, needs, 32)
        assert [g is not None for g in found] == needs
        torch.testing.assert_close(found[index], whole[index], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80])
def test_triton_causal_on_a_gpu(dim: int) -> None:
    inputs = case(8, 1000, 256, dim, dim)
    check([z * dim**-0.25 if z.ndim == 3 else z for z in inputs], 5e-4, "cuda")
