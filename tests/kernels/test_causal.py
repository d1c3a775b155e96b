"""Causal attention through slots in plain torch against all pairs of tokens in float64, and against its recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from references import (
    INF,
    assert_no_worse,
    assert_same,
    cotangents,
    dense_causal,
    differentiated,
    random,
    recurrent_causal,
)
from torch import Tensor

from hf_linattn.kernels.backends import use_backend
from hf_linattn.kernels.causal_slots import causal_slot_attention, pieces
from hf_linattn.kernels.causal_slots import torch_kernel as portable
from hf_linattn.kernels.slot_inputs import SlotInputs

NAMES = (
    "output", "mass", "query", "query slots", "query slot bias",
    "key", "key bias", "key slots", "key slot bias", "value",
)  # fmt: skip
QUERY, KEY, KEY_BIAS, KEY_SLOTS, VALUE = 0, 3, 4, 5, 7
SLOTS = (1, 2, 5, 6)  # of queries and keys, and their biases
quick = settings(max_examples=examples(60), derandomize=True, database=None)


@pytest.fixture(autouse=True)
def _torch() -> Any:
    with use_backend("torch"):
        yield


def make(tokens: int, slots: int = 5, *, batch: int = 2, heads: int = 2, scale: float = 1.0) -> list[Tensor]:
    shapes = [(batch, heads, tokens, 4), (batch, heads, tokens), (batch, heads, slots, 4), (batch, heads, slots)] * 2
    inputs = [random(*shape, seed=i, scale=scale if len(shape) == 4 else 1.0) for i, shape in enumerate(shapes)]
    return [inputs[0], *inputs[2:], random(batch, heads, tokens, 3, seed=9)]


def ours(chunk: int) -> Any:
    return lambda *tensors: causal_slot_attention(SlotInputs(*tensors), chunk)


def check(inputs: list[Tensor], chunk: int, limit: float = 1e-11) -> list[Any]:
    found = differentiated(ours(chunk), inputs)
    assert_same(found, differentiated(dense_causal, inputs, torch.float64), limit, NAMES)
    return found


@pytest.mark.parametrize(
    ("tokens", "chunk"), [(1, 1), (1, 64), (7, 1), (63, 64), (64, 64), (65, 64), (65, 16), (130, 32)]
)
def test_results_and_gradients(tokens: int, chunk: int) -> None:
    check(make(tokens), chunk)


# A group at a time, some and all; a state kept at every chunk, at some, and only at the first one.
@pytest.mark.parametrize("tile", [1, 70, 1 << 16])
@pytest.mark.parametrize("segment", [1, 2, 3, 16])
def test_groups_and_segments(tile: int, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(portable._TILE, "cpu", tile)
    monkeypatch.setattr(portable, "_SEGMENT", segment)
    inputs = make(29, batch=3, heads=1)
    check(inputs, 4)
    flat = SlotInputs(*(z.flatten(0, 1) for z in inputs))
    parts = portable._some_groups(flat, 4)
    assert len(parts) == -(-3 // max(1, tile * torch.get_num_threads() // (min(29, 4 * segment) * 5)))
    _, _, sums, masses = portable.causal_forward(flat, 4)
    kept = portable.kept_states(29, 4)
    assert kept == {1: 8, 2: 4, 3: 3, 16: 1}[segment]
    assert (sums.shape, masses.shape) == ((3, kept, 5, 3), (3, kept, 5, 2))


@pytest.mark.parametrize(("tokens", "kept"), [(1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_states_are_kept_at_the_start_of_segments(tokens: int, kept: int) -> None:
    assert portable.kept_states(tokens, 4) == kept


def test_is_the_recurrence() -> None:
    inputs = make(37, scale=2.0)
    inputs[KEY_BIAS][0, :, :3] = -INF
    output, mass = causal_slot_attention(SlotInputs(*inputs), 8)
    for t, (expected, expected_mass) in enumerate(recurrent_causal(*inputs)):
        assert_same([output[:, :, t], mass[:, :, t]], [expected, expected_mass], 1e-12)


@pytest.mark.parametrize("shared", ["batch", "batch and heads", "no dimensions"])
def test_slots_and_biases_may_be_shared(shared: str) -> None:
    inputs = make(21)
    for i in SLOTS:
        inputs[i] = inputs[i][0] if shared == "no dimensions" else inputs[i][:1]
    inputs[KEY_BIAS] = inputs[KEY_BIAS][:1] if shared == "batch" else inputs[KEY_BIAS][:1, :1]
    check(inputs, 8)


PATTERNS = ["rising", "falling", "random", "steps", "one key", "one slot", "huge", "everything"]


def spread(inputs: list[Tensor], pattern: str, nats: float) -> None:
    """Log-weights of keys that are far apart, within chunks and between them."""
    tokens = inputs[KEY_BIAS].shape[-1]
    place = torch.linspace(0, nats, tokens, dtype=torch.float64)
    if pattern == "rising":
        inputs[KEY_BIAS] += place
    elif pattern == "falling":
        inputs[KEY_BIAS] -= place
    elif pattern == "random":
        inputs[KEY] *= nats / 10
    elif pattern == "steps":
        inputs[KEY_BIAS] += place // (nats / 4) * (nats / 4)
    elif pattern == "one key":
        inputs[KEY_BIAS][..., tokens // 2] += nats
    elif pattern == "one slot":
        inputs[KEY_SLOTS][..., 0, :] *= nats / 4
    elif pattern == "huge":
        inputs[KEY][..., tokens // 3, :] *= 100 * nats
    else:
        inputs[KEY] *= nats / 10
        inputs[QUERY] *= nats / 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_keys_far_apart(pattern: str, chunk: int, dtype: torch.dtype) -> None:
    """Further than the exponents of the dtype reach: segments and chunks have to be cut."""
    inputs = make(64)
    nats = 3000.0 if dtype == torch.float64 else 300.0
    spread(inputs, pattern, nats)
    inputs = [z.to(dtype) for z in inputs]
    size = float(dense_causal(*(z.double() for z in inputs))[1].abs().max())
    check(inputs, chunk, limit=32 * max(nats, size) * torch.finfo(dtype).eps)


def cuts(inputs: list[Tensor], chunk: int, where: slice | None = None) -> list[slice]:
    """Where the tokens `where` are cut, after one piece of all before them."""
    few = SlotInputs(*(z.flatten(0, 1).float() for z in inputs))
    memory = pieces.Memory(few.key)
    maps, top = pieces.Maps(few, memory), torch.full((1, few.key_slots.shape[1]), torch.finfo(torch.float32).min)
    where = where or slice(0, few.key.shape[1])
    if where.start:
        before = slice(0, where.start)
        top = list(pieces.pieces(few, maps, before, where.start, top, memory))[-1].top
    found = list(pieces.pieces(few, maps, where, chunk, top, memory))
    assert all(len(piece.chunks(piece.keys)) * piece.chunk == piece.keys.shape[1] for piece in found)
    return [piece.where for piece in found]


@pytest.mark.parametrize(
    ("nats", "chunk", "starts"),
    [
        (50.0, 64, [0]), (50.0, 16, [0]), (50.0, 48, [0, 48]),
        (100.0, 64, [0, 32]), (100.0, 16, [0, 32]), (100.0, 24, [0, 24, 48]),
        (300.0, 64, range(0, 64, 8)), (300.0, 16, range(0, 64, 8)),
    ],
)  # fmt: skip
def test_pieces_are_as_few_as_possible(nats: float, chunk: int, starts: Sequence[int]) -> None:
    """Whole chunks and the rest; by halves, down to as many as keep what is inside within the range of float32."""
    inputs = make(64, batch=1, heads=1)
    inputs[KEY] *= 0
    inputs[KEY_BIAS] = torch.linspace(0, nats, 64).expand(1, 1, 64)
    found = cuts(inputs, chunk)
    assert [cut.start for cut in found] == list(starts)
    assert [cut.stop for cut in found] == [*starts[1:], 64]
    # Later keys are next to nothing: the reference does not move, and what is small may vanish.
    inputs[KEY_BIAS] = -inputs[KEY_BIAS]
    assert cuts(inputs, 63, slice(1, 64)) == [slice(1, 64)]


def test_slots_may_be_safe_for_different_reasons() -> None:
    """One has seen larger keys before the chunk; all keys of the chunk are large for the other."""
    inputs = make(64, slots=2, batch=1, heads=1)
    inputs[KEY], inputs[KEY_BIAS] = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 64)
    inputs[KEY_SLOTS] = torch.eye(4)[None, None, :2]
    inputs[KEY][..., 1:, 0] = torch.linspace(-200, -10, 63)
    inputs[KEY][..., 1:, 1] = torch.linspace(200, 240, 63)
    assert cuts(inputs, 63, slice(1, 64)) == [slice(1, 64)]


def test_padding_does_not_cut_pieces() -> None:
    inputs = make(64, batch=1, heads=1)
    inputs[KEY_BIAS][..., ::3] = -INF
    assert cuts(inputs, 16) == [slice(0, 64)]


@quick
@given(
    tokens=st.integers(1, 40),
    chunk=st.sampled_from([1, 2, 4, 8, 16, 64]),
    nats=st.sampled_from([0.0, 1.0, 100.0, 1000.0, 5000.0]),
    pattern=st.sampled_from(PATTERNS),
    hidden=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_the_chunk_size_changes_nothing(
    tokens: int, chunk: int, nats: float, pattern: str, hidden: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(z.shape, generator=generator, dtype=z.dtype) for z in make(tokens, 3, batch=1)]
    if nats:
        spread(inputs, pattern, nats)
    inputs[KEY_BIAS][torch.rand(inputs[KEY_BIAS].shape, generator=generator) < hidden] = -INF
    found, expected = differentiated(ours(chunk), inputs), differentiated(ours(32), inputs)
    mass = expected[1]
    size = float(mass[mass > -INF].abs().max()) if (mass > -INF).any() else 1.0
    assert_same(found, expected, 1e-12 + 64 * size * 2**-52, NAMES)


@pytest.mark.parametrize("chunk", [4, 16])
def test_keys_that_nothing_reads(chunk: int) -> None:
    inputs = make(40)
    inputs[KEY_BIAS][0, 0, :21] = -INF  # whole chunks, and the beginning of one
    inputs[KEY_BIAS][0, 1, 19:] = -INF
    inputs[KEY_BIAS][1, 0] = -INF
    inputs[KEY_BIAS][1, 1, [0, 3, 17, 39]] = -INF
    output, mass, *grads = check(inputs, chunk)
    empty, hidden = mass == -INF, inputs[KEY_BIAS] == -INF
    assert empty.sum() == 21 + 40 + 1
    assert (output[empty] == 0).all()
    assert (grads[QUERY][empty] == 0).all()
    assert all((grads[i][hidden] == 0).all() for i in (KEY, KEY_BIAS, VALUE))


@pytest.mark.parametrize("bias", [2, 6])
def test_slots_that_carry_nothing(bias: int) -> None:
    inputs = make(20)
    inputs[bias][:, :, 2] = -INF
    found = check(inputs, 8)
    assert all((found[2 + i][:, :, 2] == 0).all() for i in SLOTS)


def test_gradients_of_queries_that_see_nothing() -> None:
    inputs = make(12)
    inputs[KEY_BIAS][:, :, :5] = -INF
    leaves = [z.requires_grad_() for z in inputs]
    result = causal_slot_attention(SlotInputs(*leaves), 8)
    grads = cotangents(*result)
    expected = torch.autograd.grad(tuple(result), leaves, grads, retain_graph=True)
    grads[1][:, :, :5] = float("nan")
    found = torch.autograd.grad(tuple(result), leaves, grads)
    assert_same([*found[:1], *found[2:]], [*expected[:1], *expected[2:]], 0.0)


@pytest.mark.parametrize("chunk", [4, 16])
@pytest.mark.parametrize("nats", [0.0, 2000.0])
def test_nothing_flows_back_in_time(chunk: int, nats: float) -> None:
    """A later token changes no earlier output, and no gradient reaches it from there: exactly none."""
    inputs = make(40)
    first = causal_slot_attention(SlotInputs(*inputs), chunk)
    changed = [z.clone() for z in inputs]
    changed[KEY_BIAS][..., 22:] += nats
    changed[VALUE][..., 22:, :] += 1.0
    leaves = [z.requires_grad_() for z in changed]
    later = causal_slot_attention(SlotInputs(*leaves), chunk)
    assert_same([z[:, :, :22] for z in later], [z[:, :, :22] for z in first], 0.0 if not nats else 1e-13)
    grads = cotangents(*later)
    grads[0][:, :, 22:] = grads[1][:, :, 22:] = 0
    found = torch.autograd.grad(tuple(later), leaves, grads)
    for i in (QUERY, KEY, KEY_BIAS, VALUE):
        assert (found[i][:, :, 22:] == 0).all(), NAMES[2 + i]
        assert (found[i][:, :, 21] != 0).any(), NAMES[2 + i]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nats", [0.0, 200.0])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype, nats: float) -> None:
    inputs = [z.to(dtype) if z.ndim == 4 else z.float() for z in make(40)]
    inputs[KEY_BIAS] = inputs[KEY_BIAS] + torch.linspace(0, nats, 40)
    found = differentiated(ours(16), inputs)
    assert [z.dtype for z in found[2:]] == [z.dtype for z in inputs]
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    exact, plain = differentiated(dense_causal, inputs, torch.float64), differentiated(dense_causal, inputs, dtype)
    # Gradients are computed from the result as it was rounded, which those of plain torch are not.
    assert_no_worse(found, plain, exact, torch.finfo(dtype).eps)
    assert_same(found[1:2], exact[1:2], 1e-5)


@pytest.mark.parametrize("needed", range(8))
def test_gradients_one_at_a_time(needed: int) -> None:
    inputs = make(20)
    every = differentiated(ours(8), inputs)[2 + needed]
    inputs[needed].requires_grad_()
    result = causal_slot_attention(SlotInputs(*inputs), 8)
    (alone,) = torch.autograd.grad(tuple(result), inputs[needed], cotangents(*result))
    assert torch.equal(alone, every)


@pytest.mark.parametrize("segment", [1, 16])
def test_a_second_backward_pass_gives_the_same(segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is kept, the states among it, is changed in place."""
    monkeypatch.setattr(portable, "_SEGMENT", segment)
    inputs = make(20)
    given = [z.clone() for z in inputs]
    leaves = [z.requires_grad_() for z in inputs]
    result = causal_slot_attention(SlotInputs(*leaves), 4)
    grads = cotangents(*result)
    first = torch.autograd.grad(tuple(result), leaves, grads, retain_graph=True)
    kept = [z.detach().clone() for z in (*result, *grads)]
    second = torch.autograd.grad(tuple(result), leaves, grads)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, given, leaves))
    assert all(map(torch.equal, kept, (*result, *grads)))


def test_strides_change_nothing() -> None:
    inputs = make(20)

    def turned(*tensors: Tensor) -> Any:
        moved = SlotInputs(*(z.transpose(0, -1).contiguous().transpose(0, -1) for z in tensors))
        return causal_slot_attention(moved, 8)

    assert_same(differentiated(turned, inputs), differentiated(ours(8), inputs), 1e-13)


@pytest.mark.parametrize("place", [KEY, KEY_BIAS, VALUE])
def test_nan_stays_where_it_comes_from(place: int) -> None:
    """It is not hidden, does not reach earlier tokens of other chunks, and no chunk is cut without end."""
    inputs = make(40)
    expected = causal_slot_attention(SlotInputs(*inputs), 8)
    inputs[place][0, 0, 20] = float("nan")
    output, mass = causal_slot_attention(SlotInputs(*inputs), 8)
    assert output[0, 0, 20:].isnan().all()
    assert mass[0, 0, 20:].isnan().all() == (place != VALUE)
    for ours, exact in ((output, expected.output), (mass, expected.lse)):
        # Rounded differently: pieces are others.
        torch.testing.assert_close(ours[0, 0, :16], exact[0, 0, :16], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours[1], exact[1], rtol=1e-12, atol=1e-12)


def test_log_weights_far_below_zero() -> None:
    inputs = make(20)
    inputs[KEY_BIAS] = torch.full_like(inputs[KEY_BIAS], -(2.0**32))  # resolved to 1e-6
    inputs[KEY] *= 0
    check(inputs, 8, limit=1e-4)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0)])
def test_causal_slots_without_tokens(batch: int, tokens: int) -> None:
    check(make(tokens, batch=batch), 4)
