"""A layer that reads a sequence piece by piece with a memory gives what it gives on the whole sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CAUSAL_KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_layers import BATCH, CASES, DIM, HEADS, SCALING, TOKENS, build, get_layer, in_pieces, inputs
from torch import Tensor

from hf_linattn.kernels.backends import use_backend
from hf_linattn.modules.memory import RecurrentMemory


@st.composite
def pieces(draw: Any) -> tuple[list[int], Tensor | None]:
    """How a sequence is cut, and what of it is padding: nothing, the left, or anything."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, 14)), min_size=1, max_size=9))
    tokens = sum(sizes)
    kind = draw(st.sampled_from(["none", "left", "holes"]))
    if kind == "none":
        return sizes, None
    if kind == "left":
        padding = draw(st.lists(st.integers(0, tokens), min_size=BATCH, max_size=BATCH))
        return sizes, torch.arange(tokens) >= torch.tensor(padding)[:, None]
    bits = draw(st.lists(st.booleans(), min_size=BATCH * tokens, max_size=BATCH * tokens))
    return sizes, torch.tensor(bits).view(BATCH, tokens)


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12)
@given(cut=pieces())
@torch.no_grad()
def test_pieces_equal_the_whole(name: str, is_static: bool, cut: tuple[list[int], Tensor | None]) -> None:
    sizes, mask = cut
    layer, parts = get_layer(name), inputs(sum(sizes), mask=mask)
    whole = layer(*parts, mask, scaling=SCALING)
    memory = RecurrentMemory(static_tokens=sum(sizes) if is_static else None)
    read, _ = in_pieces(layer, parts, sizes, mask, memory)
    torch.testing.assert_close(read, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_attend_and_absorb(name: str) -> None:
    """The fast path for one token, against the general one (taken under autograd)."""
    layer, parts = get_layer(name), inputs()
    with torch.no_grad():
        fast, _ = in_pieces(layer, parts, [20] + [1] * 25)
    slow, _ = in_pieces(layer, [z.requires_grad_() for z in parts], [20] + [1] * 25)
    assert slow.requires_grad
    torch.testing.assert_close(fast, slow.detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradients_through_pieces(name: str) -> None:
    layer = build(name)
    weight = torch.randn(BATCH, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def gradients(sizes: Any) -> list[Tensor]:
        parts = [z.requires_grad_() for z in inputs()]
        layer.zero_grad()
        output = in_pieces(layer, parts, sizes)[0] if sizes else layer(*parts, scaling=SCALING)
        (output * weight).sum().backward()
        return [z.grad for z in (*parts, *layer.parameters()) if z.grad is not None]  # type: ignore[misc]

    whole, pieced = gradients(None), gradients([13, 1, 19, 12])
    assert len(whole) == len(pieced) >= 3
    for expected, found in zip(whole, pieced, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_memory_in_half_precision(name: str) -> None:
    """bfloat16 inputs: the window's tokens stay bfloat16, slots float32; as close to the whole as rounding allows."""
    layer = copy.deepcopy(get_layer(name)).float()
    layer._buffers = {k: None if b is None else b.float() for k, b in layer._buffers.items()}
    parts = inputs(dtype=torch.float32)
    exact = layer(*parts, scaling=SCALING)
    half = [z.bfloat16() for z in parts]
    read, memory = in_pieces(layer, half, [20] + [1] * 25)
    whole = layer(*half, scaling=SCALING)
    assert read.dtype == torch.bfloat16
    assert memory.state.window.key.dtype == torch.bfloat16
    error = (whole.float() - exact).norm() / exact.norm()
    assert (read.float() - exact).norm() / exact.norm() < 1.5 * error + 1e-3
    huge, _ = in_pieces(layer, [100 * z for z in half], [20] + [1] * 25)
    assert bool(huge.isfinite().all())


@pytest.mark.parametrize("name", ["favor_plus", "favor_sharp", "lara"])
@torch.no_grad()
def test_step_on_triton(name: str) -> None:
    """Without a window a step is one kernel there (run in Triton's interpreter)."""
    pytest.importorskip("triton")
    layer = copy.deepcopy(get_layer(name)).float()
    layer._buffers = {k: None if b is None else b.float() for k, b in layer._buffers.items()}
    parts = inputs(dtype=torch.float32)
    expected, _ = in_pieces(layer, parts, [40, 1, 1, 1])
    with use_backend("triton"):
        found, _ = in_pieces(layer, parts, [40, 1, 1, 1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_cases_name_every_causal_kind() -> None:
    assert {kind for kind, _ in CASES.values()} == set(CAUSAL_KINDS)
