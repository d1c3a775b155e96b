"""Groups under one softmax and half norms: against one softmax over everything in float64, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_linattn.kernels.attention_state import (
    AttentionState,
    log_or_minus_inf,
    merge_logits,
    merge_states,
    shifted_exp,
)
from hf_linattn.kernels.half_norm import half_norm, length_bias

INF = float("inf")


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def groups(logits: Tensor, values: Tensor, sizes: list[int]) -> list[AttentionState]:
    """Softmaxes over consecutive members, plainly; what a group without a visible member gives is spelled out."""
    found = []
    for part, some in zip(logits.split(sizes, -1), values.split(sizes, -2), strict=True):
        empty = (part == -INF).all(-1)
        part = part.masked_fill(empty.unsqueeze(-1), 0.0)
        found.append(
            AttentionState(
                (part.softmax(-1) @ some).masked_fill(empty.unsqueeze(-1), 0.0),
                part.logsumexp(-1).masked_fill(empty, -INF),
            )
        )
    return found


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 6], [2, 3, 2], [1, 1, 1, 4]])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_merge_is_the_softmax_over_the_union(sizes: list[int], scale: float) -> None:
    logits, values = random(2, 5, 7, scale=scale).requires_grad_(), random(2, 7, 3, seed=1).requires_grad_()
    hidden = torch.zeros(2, 5, 7, dtype=torch.bool)
    hidden[0, 0, : sizes[0]] = hidden[0, 1, sizes[0] :] = hidden[1, 2] = True
    masked = logits.masked_fill(hidden, -INF)
    grads = random(2, 5, 3, seed=2), random(2, 5, seed=3)
    results = []
    for partial in (merge_states(groups(masked, values, sizes)), groups(masked, values, [7])[0]):
        seen = partial.lse > -INF
        found = torch.autograd.grad(
            (partial.output, partial.lse[seen]), (logits, values), (grads[0], grads[1][seen]), retain_graph=True
        )
        results.append([partial.output, partial.lse, *found])
    for ours, expected in zip(*results, strict=True):
        assert not ours.isnan().any()
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert results[0][1][1, 2] == -INF
    assert (results[0][0][1, 2] == 0).all()
    assert (results[0][2][hidden] == 0).all()


@pytest.mark.parametrize("few", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_a_few_members_by_their_logits(few: int, scale: float) -> None:
    logits, values = random(2, 5, 7, scale=scale).requires_grad_(), random(2, 7, 3, seed=1).requires_grad_()
    hidden = torch.zeros(2, 5, 7, dtype=torch.bool)
    hidden[0, 0, :few] = hidden[0, 1, few:] = hidden[1, 2] = True
    masked = logits.masked_fill(hidden, -INF)
    grads = random(2, 5, 3, seed=2), random(2, 5, seed=3)
    rest = groups(masked[..., few:], values[..., few:, :], [7 - few])[0]
    results = []
    for partial in (merge_logits(rest, masked[..., :few], values[..., :few, :]), groups(masked, values, [7])[0]):
        seen = partial.lse > -INF
        found = torch.autograd.grad(
            (partial.output, partial.lse[seen]), (logits, values), (grads[0], grads[1][seen]), retain_graph=True
        )
        results.append([partial.output, partial.lse, *found])
    for ours, expected in zip(*results, strict=True):
        assert not ours.isnan().any()
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert results[0][1][1, 2] == -INF
    assert (results[0][2][hidden] == 0).all()
    half = merge_logits(AttentionState(rest.output.bfloat16(), rest.lse), masked[..., :few], values[..., :few, :])
    assert half.output.dtype == torch.bfloat16
    torch.testing.assert_close(half.output.double(), results[1][0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("number", [2, 3])
def test_groups_in_any_order(number: int) -> None:
    parts = groups(random(5, 7), random(7, 3, seed=1), [2, 5] if number == 2 else [2, 4, 1])
    for ours, expected in zip(merge_states(parts), merge_states(parts[::-1]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_nothing_visible_anywhere(number: int) -> None:
    parts = [AttentionState(torch.zeros(4, 3).double(), torch.full((4,), -INF).double()) for _ in range(number)]
    leaves = [z.requires_grad_() for part in parts for z in part]
    merged = merge_states([AttentionState(*leaves[2 * i : 2 * i + 2]) for i in range(number)])
    assert (merged.output == 0).all()
    assert (merged.lse == -INF).all()
    found = torch.autograd.grad(merged.output.sum(), leaves, allow_unused=True)
    assert all(z is None or z.isfinite().all() for z in found)
    assert all(found[1 + 2 * i] is None or not found[1 + 2 * i].any() for i in range(number))


@pytest.mark.parametrize("number", [2, 3])
def test_a_group_that_weighs_nothing_changes_no_bit(number: int) -> None:
    one = groups(random(5, 7).float(), random(7, 3, seed=1).float(), [7])[0]
    nothing = AttentionState(torch.zeros(5, 3), torch.full((5,), -INF))
    for place in range(number):
        parts = [nothing] * number
        parts[place] = one
        merged = merge_states(parts)
        assert torch.equal(merged.output, one.output)
        torch.testing.assert_close(merged.lse, one.lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("distance", [40.0, 1e4, 1e30])
def test_masses_far_apart(number: int, distance: float) -> None:
    """In float32 nothing overflows, whichever is the heavier group."""
    for sign in (1, -1):
        masses = [torch.tensor([0.0]), torch.tensor([sign * distance]), torch.tensor([-INF])][:number]
        merged = merge_states(
            [AttentionState(torch.full((1, 2), float(i + 1)), mass) for i, mass in enumerate(masses)]
        )
        assert torch.equal(merged.output, torch.full((1, 2), 2.0 if sign > 0 else 1.0))
        assert merged.lse == max(0.0, sign * distance)


def test_halves_are_merged_with_wide_masses() -> None:
    parts = [AttentionState(random(5, 3, seed=i).bfloat16(), random(5, seed=9 + i).float()) for i in range(2)]
    merged = merge_states(parts)
    assert merged.output.dtype == torch.bfloat16
    assert merged.lse.dtype == torch.float32
    exact = merge_states([AttentionState(part.output.double(), part.lse.double()) for part in parts])
    torch.testing.assert_close(merged.lse.double(), exact.lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.output.double(), exact.output, rtol=1e-2, atol=1e-2)
    # Of one dtype each: the wider one.
    assert (
        merge_states([parts[0], AttentionState(parts[1].output.float(), parts[1].lse)]).output.dtype == torch.float32
    )


def test_shifted_exponentials() -> None:
    logits = torch.tensor([[1000.0, 1001.0, -INF], [-INF, -INF, -INF], [-1e30, -2e30, -INF]], dtype=torch.float64)
    weights, top = shifted_exp(logits.requires_grad_())
    assert top.tolist() == [1001.0, torch.finfo(torch.float64).min, -1e30]
    assert weights[0].tolist() == pytest.approx([2.718281828**-1, 1.0, 0.0])
    assert weights[1:].tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    torch.testing.assert_close(grad, weights.detach())  # the maximum counts as a constant
    safe, log = log_or_minus_inf(torch.tensor([0.0, 2.0], requires_grad=True))
    assert safe.tolist() == [1.0, 2.0]
    assert log.tolist() == [-INF, pytest.approx(0.6931472)]


# -- half norms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 7, 64), (0, 4)])
def test_half_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape).to(dtype).requires_grad_()
    exact, grad = x.detach().double().requires_grad_(), random(*shape[:-1], seed=1)
    found, expected = half_norm(x), exact.square().sum(-1) / 2
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    (ours,), (best,) = torch.autograd.grad(found, x, grad.to(found)), torch.autograd.grad(expected, exact, grad)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), best, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_half_norms_of_large_tokens_do_not_overflow() -> None:
    """60000 squared is far beyond what float16 holds."""
    assert half_norm(torch.tensor([60000.0, 60000.0], dtype=torch.float16)) == pytest.approx(3.6e9, rel=1e-3)


def test_half_norms_under_vmap_and_grad() -> None:
    x = random(4, 3)
    grad = torch.func.vmap(torch.func.grad(lambda z: half_norm(z).sin()))(x)
    torch.testing.assert_close(grad, x * (x.square().sum(-1, keepdim=True) / 2).cos())
    torch.autograd.gradcheck(half_norm, (x.requires_grad_(),))


@pytest.mark.parametrize("options", [{}, {"factor": 0.7}, {"less": 2.5}, {"factor": 0.7, "less": 2.5}], ids=str)
def test_length_bias(options: dict[str, float]) -> None:
    x = random(2, 3, 7, 4).requires_grad_()
    expected = -options.get("factor", 1.0) * x.square().sum(-1, keepdim=True) / 2 - options.get("less", 0.0)
    for given in (x, x.detach()):
        torch.testing.assert_close(length_bias(given, **options), expected.detach() if given is not x else expected)
    torch.autograd.gradcheck(lambda z: length_bias(z, **options), (x,))
    torch.autograd.gradgradcheck(lambda z: length_bias(z, **options).sin(), (x,))


def test_second_derivatives_of_half_norms() -> None:
    """That of |x|^2 / 2 is the identity."""
    hessian = torch.autograd.functional.hessian(lambda z: half_norm(z), random(3))
    torch.testing.assert_close(hessian, torch.eye(3, dtype=torch.float64))
