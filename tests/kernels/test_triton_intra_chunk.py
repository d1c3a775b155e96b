"""Slots inside causal chunks in Triton against a dense logsumexp over slots in float64, with all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.kernels.attention_state import AttentionState
from hf_linattn.kernels.causal_slots.triton_launch import intra_chunk_backward, intra_chunk_forward
from hf_linattn.kernels.slot_inputs import SlotInputs

INF = float("inf")
NAMES = ("output", "mass", "x", "w", "w bias", "y", "y bias", "k", "k bias", "value")


def dense(
    x: Tensor,
    query_slots: Tensor,
    query_slot_bias: Tensor,
    y: Tensor,
    y_bias: Tensor,
    key_slots: Tensor,
    key_slot_bias: Tensor,
    value: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    a = x @ query_slots.mT + query_slot_bias[:, None]
    c = y @ key_slots.mT + y_bias[..., None] + key_slot_bias[:, None]
    token = torch.arange(x.shape[1], device=x.device)
    hidden = (token > token[:, None]) | (token // chunk != (token // chunk)[:, None])
    hidden = hidden | (y_bias == -INF)[:, None]
    logits = torch.where(hidden[..., None], 0.0, a[:, :, None] + c[:, None])  # no -inf in anything that is derived
    logits = logits.logsumexp(-1).masked_fill(hidden, -INF)
    empty = hidden.all(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0.0)
    weights = logits.softmax(-1).masked_fill(empty, 0.0)
    return weights.to(value) @ value, logits.logsumexp(-1).masked_fill(empty.squeeze(-1), -INF)


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def case(groups: int, tokens: int, slots: int, dim: int, width: int, scale: float = 1.0) -> list[Tensor]:
    shapes = [(groups, tokens, dim), (groups, tokens), (groups, slots, dim), (groups, slots)] * 2
    inputs = [random(*shape, seed=i, scale=scale if len(shape) == 3 else 1.0) for i, shape in enumerate(shapes)]
    return [inputs[0], *inputs[2:], random(groups, tokens, width, seed=9)]


def exact(inputs: list[Tensor], chunk: int, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    return differentiated([z.double() for z in inputs], chunk, grads)


def differentiated(inputs: list[Tensor], chunk: int, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The dense formula and its gradients in the dtypes of the inputs."""
    inputs = [z.detach().requires_grad_() for z in inputs]
    output, mass = dense(*inputs, chunk)
    seen = mass > -INF
    found = torch.autograd.grad((output, mass[seen]), inputs, (grads[0].to(output), grads[1].to(mass)[seen]))
    return [output.detach(), mass.detach(), *found]


def ours(inputs: list[Tensor], chunk: int, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    results = intra_chunk_forward(SlotInputs(*inputs), chunk)
    return [*results, *backward(grads, inputs, results, [True] * 8, chunk)]


def backward(grads: Any, inputs: list[Tensor], results: Any, needs: list[bool], chunk: int) -> list[Any]:
    return intra_chunk_backward(AttentionState(*grads), SlotInputs(*inputs), AttentionState(*results), needs, chunk)


def cotangents(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    value = inputs[-1]
    return random(*value.shape, seed=10).to(value), random(*value.shape[:2], seed=11).to(value.device)


def check(inputs: list[Tensor], chunk: int, limit: float = 2e-5) -> None:
    grads = cotangents(inputs)
    found, expected = ours(inputs, chunk, grads), exact(inputs, chunk, grads)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert not a.isnan().any(), name
        size = max(1.0, float(b[b > -INF].abs().max()))
        torch.testing.assert_close(a.double(), b, rtol=limit, atol=limit * size, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("tokens", "chunk", "slots", "dim", "width"),
    [(16, 16, 1, 1, 3), (32, 16, 5, 4, 20), (64, 32, 17, 20, 16), (64, 64, 40, 3, 1), (128, 128, 9, 8, 4)],
)
def test_matches_a_dense_logsumexp(tokens: int, chunk: int, slots: int, dim: int, width: int) -> None:
    check(case(2, tokens, slots, dim, width), chunk)


@pytest.mark.parametrize("chunk", [16, pytest.param(32, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize("pattern", ["rising", "falling", "random", "between segments", "one key"])
def test_keys_hundreds_of_nats_apart(pattern: str, chunk: int) -> None:
    """Every branch: a later key outweighs earlier ones by far, in all slots or some, within segments or between."""
    inputs = case(1, 64, 6, 4, 3)
    place = torch.arange(64.0) % chunk
    if pattern == "rising":
        inputs[4] = (place * (200.0 / chunk)).expand(1, -1).clone()
    elif pattern == "falling":
        inputs[4] = (place * (-200.0 / chunk)).expand(1, -1).clone()
    elif pattern == "random":
        inputs[3] *= 25.0
    elif pattern == "between segments":
        inputs[4] = ((place // 16) * 60.0 + random(64, seed=5)).expand(1, -1).clone()
    else:
        inputs[4][0, 37] += 200.0
    check(inputs, chunk, limit=2e-4)  # logits of 200 are resolved to 1.5e-5, and several are added up


@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_masked_keys_and_rows_that_see_nothing(scale: float) -> None:
    inputs = case(2, 64, 6, 4, 3, scale=scale**0.5)
    inputs[4][0, :35] = -INF  # a whole chunk, and the beginning of the next one
    inputs[4][1, 40:] = -INF
    inputs[4][1, [0, 3, 17]] = -INF
    grads = cotangents(inputs)
    results = intra_chunk_forward(SlotInputs(*inputs), 32)
    empty = results[1] == -INF
    assert empty[0, :35].all()
    assert empty.sum() == 36
    assert (results[0][empty] == 0).all()
    grads = (grads[0].masked_fill(empty[..., None], float("nan")), grads[1].masked_fill(empty, float("nan")))
    found = backward(grads, inputs, results, [True] * 8, 32)
    clean = tuple(g.nan_to_num(0.0) for g in grads)
    for name, a, b in zip(NAMES[2:], found, exact(inputs, 32, clean)[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    hidden = inputs[4] == -INF
    assert all((found[i][hidden] == 0).all() for i in (3, 4, 7))


@pytest.mark.parametrize("side", [2, 6])
def test_slots_that_carry_nothing(side: int) -> None:
    inputs = case(1, 32, 5, 4, 3)
    inputs[side][0, 2] = -INF
    grads = cotangents(inputs)
    results = intra_chunk_forward(SlotInputs(*inputs), 32)
    fewer = [z[:, [0, 1, 3, 4]] if i in (1, 2, 5, 6) else z for i, z in enumerate(inputs)]
    expected = exact(fewer, 32, grads)
    found = backward(grads, inputs, results, [True] * 8, 32)
    for i, (a, b) in enumerate(zip([*results, *found], expected, strict=True)):
        if i - 2 in (1, 2, 5, 6):
            assert (a[:, 2] == 0).all()
            a = a[:, [0, 1, 3, 4]]
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("large", [0.0, 200.0])
def test_nothing_flows_back_in_time(large: float) -> None:
    """A later key changes no earlier output, not even in its last bit; and no gradient reaches it from there."""
    inputs = case(1, 32, 5, 4, 3)
    grads = cotangents(inputs)
    output, mass = intra_chunk_forward(SlotInputs(*inputs), 32)
    changed = [z.clone() for z in inputs]
    changed[3][:, 20:] += 1.0
    changed[4][:, 20:] += large
    changed[7][:, 20:] += 1.0
    later = intra_chunk_forward(SlotInputs(*changed), 32)
    torch.testing.assert_close(later[0][:, :20], output[:, :20], rtol=0, atol=0 if not large else 1e-6)
    torch.testing.assert_close(later[1][:, :20], mass[:, :20], rtol=0, atol=0 if not large else 1e-5)
    early = torch.arange(32) < 20
    only_early = (grads[0] * early[:, None], grads[1] * early)
    found = backward(only_early, changed, later, [True] * 8, 32)
    assert all((found[i][:, 20:] == 0).all() for i in (3, 4, 7))
    assert all((found[i][:, :20] != 0).any() for i in (3, 4, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rising", [0.0, 4.0])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype, rising: float) -> None:
    inputs = [z.to(dtype) if z.ndim == 3 else z for z in case(1, 64, 20, 8, 8)]
    inputs[4] = inputs[4] + torch.arange(64.0) * rising
    grads = cotangents(inputs)
    expected = exact(inputs, 64, grads)
    plain = differentiated(inputs, 64, grads)
    for name, a, b, c in zip(NAMES, ours(inputs, 64, grads), plain, expected, strict=True):
        ours_off, plain_off = ((z.double() - c).abs().max() for z in (a, b))
        rounding = torch.finfo(dtype).eps * c[c > -INF].abs().max()  # of the features, which plain torch does not have
        assert ours_off <= 2 * plain_off + rounding, f"{name}: off by {ours_off:.1e}, torch by {plain_off:.1e}"


def test_slots_may_be_shared_and_tokens_strided() -> None:
    inputs = case(2, 32, 5, 4, 3)
    for i in (1, 2, 5, 6):
        inputs[i] = inputs[i][:1].expand_as(inputs[i])
    for i in (0, 3, 7):
        inputs[i] = inputs[i].transpose(0, 1).contiguous().transpose(0, 1)
    check(inputs, 16)


def test_only_what_is_needed() -> None:
    inputs = case(1, 16, 3, 4, 2)
    grads, results = cotangents(inputs), intra_chunk_forward(SlotInputs(*inputs), 16)
    whole = backward(grads, inputs, results, [True] * 8, 16)
    for index in range(8):
        needs = [i == index for i in range(8)]
        found = backward(grads, inputs, results, needs, 16)
        assert [g is not None for g in found] == needs
        assert torch.equal(found[index], whole[index])


def test_refuses_what_it_cannot_do() -> None:
    inputs = case(1, 48, 3, 4, 2)
    with pytest.raises(InputError, match=r"\[16, 32, 64, 128\].*24"):
        intra_chunk_forward(SlotInputs(*inputs), 24)
    with pytest.raises(InputError, match="multiple of chunk=32; got 48"):
        intra_chunk_forward(SlotInputs(*inputs), 32)
    with pytest.raises(UnsupportedError, match="float64"):
        intra_chunk_forward(SlotInputs(*(z.double() for z in inputs)), 16)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("chunk", [32, 64, 128])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_triton_intra_chunk_on_a_gpu(dim: int, chunk: int, scale: float) -> None:
    inputs = [z.cuda() for z in case(4, 512, 256, dim, dim, scale=scale * dim**-0.25)]
    check(inputs, chunk, limit=2e-4)
    grads = cotangents(inputs)
    first, again = ours(inputs, chunk, grads), ours(inputs, chunk, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
