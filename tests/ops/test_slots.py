"""The two-softmax structure: masses, merging, states of blocks, halves, all against dense log-space formulas."""

from __future__ import annotations

import pytest
import torch
from helpers import random
from torch import Tensor

from hf_linattn.kernels.attention_state import AttentionState, merge_states
from hf_linattn.ops import dense_slots
from hf_linattn.ops.dense_slots import between_halves, own_token
from hf_linattn.ops.noise import Dropped
from hf_linattn.ops.slot_weights import DenseSlotWeights
from hf_linattn.ops.softmax import softmax_with_lse

INF = float("inf")


def assert_partial(ours: AttentionState, output: Tensor, lse: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(ours.lse, lse, rtol=0, atol=atol)
    torch.testing.assert_close(ours.output, output, rtol=0, atol=atol)


@pytest.mark.parametrize("width", [1, 3, 9])  # fewer and more values than weights: both ways to normalise
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_weigh_is_softmax_with_its_logsumexp(width: int, scale: float) -> None:
    logits, values = random(2, 4, 5, scale=scale), random(2, 5, width, seed=1)
    logits[0, 1, 2:] = -INF
    assert_partial(softmax_with_lse(logits, values), logits.softmax(-1) @ values, logits.logsumexp(-1))


@pytest.mark.parametrize("width", [2, 9])
def test_empty_groups_weigh_nothing_and_pass_no_gradient(width: int) -> None:
    base, values = random(3, 4).requires_grad_(), random(4, width, seed=1).requires_grad_()
    empty = torch.tensor([False, True, False])
    logits = base.masked_fill(empty[:, None], -INF)
    part = softmax_with_lse(logits, values)
    assert (part.output[1] == 0).all()
    assert part.lse[1] == -INF
    merged = merge_states(
        [
            part,
            softmax_with_lse(logits - 1, values),
            AttentionState(torch.zeros(3, width).double(), torch.full((3,), -INF).double()),
        ]
    )
    assert (merged.output[1] == 0).all()
    assert merged.lse[1] == -INF
    (merged.output.square().sum() + merged.lse[~empty].sum()).backward()
    assert (base.grad[1] == 0).all()
    assert base.grad[[0, 2]].isfinite().all()
    assert base.grad[[0, 2]].abs().sum() > 0
    assert values.grad.isfinite().all()


def test_gradients_of_weigh_and_merge() -> None:
    logits, values = random(3, 6).requires_grad_(), random(6, 2, seed=1).requires_grad_()

    def split(logits: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            merge_states([softmax_with_lse(logits[:, :2], values[:2]), softmax_with_lse(logits[:, 2:], values[2:])])
        )

    torch.autograd.gradcheck(split, (logits, values))


def test_merge_is_the_softmax_of_the_union_in_any_order() -> None:
    logits, values = random(2, 3, 9, scale=50), random(2, 9, 4, seed=1)
    logits[0, 0, 3:] = -INF
    whole = softmax_with_lse(logits, values)
    a, b, c = (softmax_with_lse(logits[..., i], values[:, i]) for i in (slice(0, 2), slice(2, 3), slice(3, 9)))
    for parts in ([a, b, c], [c, a, b], [merge_states([a, b]), c], [a, merge_states([b, c])]):
        assert_partial(merge_states(parts), whole.output, whole.lse, atol=1e-11)


def test_dropout_of_slots_keeps_the_expectation_and_the_mass() -> None:
    logits, values = random(1, 6).expand(20000, 6), random(6, 2, seed=1)
    mask = torch.rand(20000, 6) < 0.4
    plain, dropped = softmax_with_lse(logits, values), softmax_with_lse(logits, values, dropped=Dropped(mask, 0.6))
    assert torch.equal(plain.lse, dropped.lse)
    error = (dropped.output.mean(0) - plain.output[0]) / (dropped.output.std(0) / 20000**0.5)
    assert dropped.output.std(0).min() > 0.1
    assert error.abs().max() < 5


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_through_slots_equals_the_dense_kernel(scale: float) -> None:
    a, c, v = random(2, 5, 7, scale=scale), random(2, 6, 7, seed=1, scale=scale), random(2, 6, 3, seed=2)
    c[0, 4] = -INF
    dense = (a[:, :, None] + c[:, None]).logsumexp(-1)
    assert_partial(
        DenseSlotWeights(a).read(DenseSlotWeights(c).summarise(v)),
        dense.softmax(-1) @ v,
        dense.logsumexp(-1),
        atol=1e-11,
    )


def test_own_token_reads_only_its_position() -> None:
    a, c, v = random(4, 7), random(4, 7, seed=1), random(4, 3, seed=2)
    c[1] = -INF
    part = own_token(a, c, v)
    v[1] = 0  # no mass, and by convention no output
    assert_partial(part, v, (a + c).logsumexp(-1))


# -- states of blocks -----------------------------------------------------------------------------------------------


def states(blocks: int, seed: int = 0) -> tuple[AttentionState, Tensor, Tensor]:
    c, v = random(2, blocks, 3, 5, seed=seed, scale=40), random(2, blocks, 3, 4, seed=seed + 1)
    if blocks > 1:
        c[0, 0] = -INF  # an empty first block, as left padding would leave it
    return softmax_with_lse(c.mT, v), c, v


def others_of(own: AttentionState, is_causal: bool) -> AttentionState:
    number = torch.arange(own.lse.shape[-2])
    return dense_slots.states_around(own, number, None if is_causal else number + 1)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 40])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dense_blocks", [0, 32, 1000])
def test_states_of_other_blocks(
    blocks: int, is_causal: bool, dense_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_slots, "_DENSE_BLOCKS", dense_blocks)
    own, c, v = states(blocks)
    ours = others_of(own, is_causal)
    for i in range(blocks):
        others = [k for k in range(blocks) if (k < i if is_causal else k != i)]
        if not others:
            assert (ours.output[:, i] == 0).all()
            assert (ours.lse[:, i] == -INF).all()
            continue
        logits = c[:, others].flatten(1, 2).transpose(-1, -2)  # [2, slots, keys]
        expected = logits.softmax(-1).nan_to_num() @ v[:, others].flatten(1, 2)
        torch.testing.assert_close(ours.lse[:, i], logits.logsumexp(-1), rtol=0, atol=1e-11)
        torch.testing.assert_close(ours.output[:, i], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_both_paths_agree(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for dense_blocks in (0, 1000):
        monkeypatch.setattr(dense_slots, "_DENSE_BLOCKS", dense_blocks)
        _, c, v = states(6)
        c, v = (c / 40).requires_grad_(), v.requires_grad_()
        far = others_of(softmax_with_lse(c.mT, v), is_causal)
        loss = (far.output * random(*far.output.shape, seed=3)).sum()
        loss = loss + far.lse.masked_fill(far.lse == -INF, 0.0).sin().sum()
        grads.append(torch.autograd.grad(loss, (c, v)))
        assert all(g.isfinite().all() for g in grads[-1])
    for scan, dense in zip(*grads, strict=True):
        torch.testing.assert_close(scan, dense, rtol=0, atol=1e-12)


# -- neighbours -----------------------------------------------------------------------------------------------------


def halves_reference(a: Tensor, c: Tensor, v: Tensor, half: int, is_causal: bool) -> AttentionState:
    n = a.shape[-2]
    token = torch.arange(n)
    pair, side = token // (2 * half), token // half % 2
    visible = (pair[:, None] == pair) & (side[:, None] != side)
    if is_causal:
        visible &= side[:, None] == 1
    dense = (a[..., :, None, :] + c[..., None, :, :]).logsumexp(-1).masked_fill(~visible, -INF)
    mass = dense.logsumexp(-1)
    return AttentionState(dense.softmax(-1).nan_to_num() @ v, mass)


@pytest.mark.parametrize(("tokens", "half"), [(2, 1), (8, 1), (8, 2), (8, 4), (12, 3)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [1.0, 80.0])
def test_between_halves(tokens: int, half: int, is_causal: bool, scale: float) -> None:
    a, c, v = (
        random(2, tokens, 5, scale=scale),
        random(2, tokens, 5, seed=1, scale=scale),
        random(2, tokens, 3, seed=2),
    )
    c[0, 0] = -INF  # a padded key
    c[1, :half] = -INF  # a half without any key
    expected = halves_reference(a, c, v, half, is_causal)
    assert_partial(between_halves(a, c, v, half, is_causal=is_causal), *expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", range(8))
def test_one_key_far_above_the_rest_starves_nobody(where: int, dtype: torch.dtype) -> None:
    # 200 nats are e^200 = 7e86: beyond float32. Queries that do not see the key must not lose their own keys to it.
    a, c, v = random(1, 8, 5), random(1, 8, 5, seed=1), random(1, 8, 3, seed=2)
    c[:, where] += 200
    for half in (1, 2, 4):
        expected = halves_reference(a, c, v, half, True)
        ours = between_halves(a.to(dtype), c.to(dtype), v.to(dtype), half, is_causal=True)
        torch.testing.assert_close(
            ours.output, expected.output.to(dtype), rtol=0, atol=1e-4 if dtype is torch.float32 else 1e-12
        )
        torch.testing.assert_close(ours.lse, expected.lse.to(dtype), rtol=1e-6, atol=1e-5)


def test_slots_far_apart_do_not_underflow() -> None:
    # Each slot is dominated by another key; a query that prefers the weak slot must still read it.
    a = torch.tensor([[0.0, 0.0], [300.0, 0.0], [0.0, 0.0], [0.0, 300.0]])[None]
    c = torch.tensor([[0.0, -150.0], [-150.0, 0.0], [0.0, -400.0], [-400.0, 0.0]])[None]
    v = torch.eye(4)[None]
    expected = halves_reference(a.double(), c.double(), v.double(), 2, False)
    assert_partial(
        between_halves(a, c, v, 2, is_causal=False), expected.output.float(), expected.lse.float(), atol=1e-6
    )
