"""One token at a time through slots, in torch and in Triton, against attention over the whole prefix in float64."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.kernels.attention_state import AttentionState
from hf_linattn.kernels.backends import use_backend
from hf_linattn.kernels.decode import Decoded, decode_step
from hf_linattn.kernels.decode.operator import _fold, _step
from hf_linattn.kernels.slot_inputs import SlotInputs

INF = float("inf")
NAMES = ("output", "lse", "state output", "state lse")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
every_backend = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])


class Stream(NamedTuple):
    """`[steps, *lead, ...]` for tokens, `[..., slots, ...]` for slots."""

    query: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor
    query_slots: Tensor
    query_slot_bias: Tensor
    key_slots: Tensor
    key_slot_bias: Tensor

    def inputs(self, step: int) -> SlotInputs:
        """The token of a step."""
        query, key, key_bias, value = (t[step] for t in self[:4])
        return SlotInputs(query, *self[4:6], key, key_bias, *self[6:], value)


def make(
    steps: int = 4,
    lead: tuple[int, ...] = (2, 3),
    slots: int = 21,
    dim: int = 10,
    head_dim: int = 18,
    *,
    shared: bool = True,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    device: str = DEVICE,
) -> Stream:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    of_slots = (lead[-1:] if shared else lead) + (slots,)
    return Stream(
        (random(steps, *lead, 1, dim) * scale).to(dtype),
        (random(steps, *lead, 1, dim) * scale).to(dtype),
        random(steps, *lead, 1) * scale,
        random(steps, *lead, 1, head_dim).to(dtype),
        random(*of_slots, dim),
        random(*of_slots),
        random(*of_slots, dim),
        random(*of_slots),
    )


def empty_state(stream: Stream) -> AttentionState:
    lead, slots = stream.value.shape[1:-2], stream.key_slot_bias.shape[-1]
    device = stream.value.device
    mass = torch.full((*lead, slots), -INF, device=device)
    return AttentionState(torch.zeros(*lead, slots, stream.value.shape[-1], device=device), mass)


def run(stream: Stream, backend: str) -> list[Decoded]:
    state, found = empty_state(stream), []
    for step in range(len(stream.query)):
        with use_backend(backend):
            found.append(decode_step(stream.inputs(step), state))
        state = found[-1].state
    return found


def exact(stream: Stream) -> list[Decoded]:
    """From the whole prefix at every step, in float64."""
    query, key, key_bias, value, query_slots, query_slot_bias, key_slots, key_slot_bias = (t.double() for t in stream)
    found = []
    for step in range(len(query)):
        keys = (key_slots * key[: step + 1]).sum(-1) + key_bias[: step + 1] + key_slot_bias
        mass = keys.logsumexp(0)
        weights = (keys - mass.masked_fill(mass == -INF, 0.0)).exp()  # [steps, ..., slots]
        state = (weights.unsqueeze(-1) * value[: step + 1]).sum(0)
        logits = (query_slots * query[step]).sum(-1) + query_slot_bias + mass
        lse = logits.logsumexp(-1, keepdim=True)
        shares = (logits - lse.masked_fill(lse == -INF, 0.0)).exp()
        output = (shares.unsqueeze(-1) * state).sum(-2, keepdim=True)
        found.append(Decoded(output, lse, AttentionState(state, mass)))
    return found


def flat(found: Decoded) -> tuple[Tensor, ...]:
    return (found.output, found.lse, *found.state)


def assert_close(found: list[Decoded], expected: list[Decoded], limit: float = 3e-6) -> None:
    for step, (mine, best) in enumerate(zip(found, expected, strict=True)):
        for name, a, b in zip(NAMES, flat(mine), flat(best), strict=True):
            assert torch.equal(a == -INF, b == -INF), (step, name)
            a, b = a.double().nan_to_num(nan=INF, neginf=0.0), b.nan_to_num(neginf=0.0)
            error = (a - b).abs().max() / b.abs().max().clamp_min(1.0)
            assert error <= limit, f"{name} of step {step} is off by {error:.2e}"


@every_backend
@pytest.mark.parametrize(
    ("slots", "dim", "head_dim"), [(1, 1, 1), (63, 16, 16), (65, 3, 20), (20, 80, 130), (300, 20, 7)]
)
def test_steps_are_the_whole_prefix(slots: int, dim: int, head_dim: int, backend: str) -> None:
    stream = make(3, (1, 2), slots, dim, head_dim)
    assert_close(run(stream, backend), exact(stream))


@every_backend
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 2, 3)])
def test_leading_dimensions(lead: tuple[int, ...], shared: bool, backend: str) -> None:
    stream = make(2, lead, 9, 4, 5, shared=shared)
    found = run(stream, backend)
    assert found[0].output.shape == (*lead, 1, 5)
    assert_close(found, exact(stream))


@every_backend
def test_hidden_keys_change_nothing(backend: str) -> None:
    stream = make()
    stream.key_bias[0] = -INF  # nothing was seen yet: as empty as before
    stream.key_bias[2, 1] = -INF
    found = run(stream, backend)
    assert not found[0].output.any()
    assert (found[0].lse == -INF).all()
    assert_close(found, exact(stream))
    torch.testing.assert_close(found[2].state.output[1], found[1].state.output[1], rtol=1e-6, atol=1e-7)


@every_backend
def test_the_given_state_is_not_changed(backend: str) -> None:
    stream = make(2)
    first = run(stream, backend)[0]
    before = [t.clone() for t in first.state]
    with use_backend(backend):
        decode_step(stream.inputs(1), first.state)
    assert all(torch.equal(a, b) for a, b in zip(before, first.state, strict=True))


@every_backend
def test_huge_values(backend: str) -> None:
    """Rounding of a log-weight is relative to its size and becomes a relative error of a weight."""
    stream = make(5, scale=300.0)
    assert_close(run(stream, backend), exact(stream), limit=2e-3)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens(dtype: torch.dtype, backend: str) -> None:
    """The state is float32: only the output is rounded."""
    stream = make(4, dtype=dtype)
    found, best = run(stream, backend), exact(stream)
    assert found[-1].output.dtype == dtype
    assert_close([f._replace(output=b.output) for f, b in zip(found, best, strict=True)], best)
    for mine, other in zip(found, best, strict=True):
        rounding = torch.finfo(dtype).eps / 2 * other.output.abs() + 1e-6
        assert ((mine.output.double() - other.output).abs() <= rounding).all()


@every_backend
def test_strides_change_nothing(backend: str) -> None:
    stream = make()
    moved = Stream(*[t.transpose(0, -1).contiguous().transpose(0, -1) for t in stream])
    for mine, other in zip(run(stream, backend), run(moved, backend), strict=True):
        torch.testing.assert_close(flat(mine), flat(other), rtol=1e-6, atol=3e-6)
    last, state = stream.inputs(-1), run(stream, backend)[-2].state
    turned = AttentionState(*(t.transpose(0, -1).contiguous().transpose(0, -1) for t in state))
    with use_backend(backend):
        mine, other = decode_step(last, state), decode_step(last, turned)
    torch.testing.assert_close(flat(mine), flat(other), rtol=1e-6, atol=3e-6)


def test_shared_slots_are_not_copied() -> None:
    slots = torch.zeros(3, 256, 64)
    assert _fold(slots, torch.Size((2, 3)), 2).data_ptr() == slots.data_ptr()


@every_backend
def test_gradients_and_half_precision_states_are_refused(backend: str) -> None:
    stream = make(1)
    inputs, state = stream.inputs(0), empty_state(stream)
    with use_backend(backend):
        with pytest.raises(InputError, match=r"state.output must be float32.*bfloat16"):
            decode_step(inputs, AttentionState(state.output.bfloat16(), state.lse))
        inputs.query.requires_grad_()
        with pytest.raises(UnsupportedError, match="no_grad"):
            decode_step(inputs, state)
        with torch.no_grad():
            decode_step(inputs, state)


@needs_triton
def test_float64_is_for_torch() -> None:
    stream = Stream(*[t.double() for t in make(1)])
    inputs, state = stream.inputs(0), AttentionState(*(t.double() for t in empty_state(stream)))
    assert decode_step(inputs, state).output.dtype == torch.float64
    with use_backend("triton"), pytest.raises(UnsupportedError, match="float64"):
        decode_step(inputs, state)


@every_backend
def test_compiles_without_graph_breaks(backend: str) -> None:
    stream = make(2)
    inputs = stream.inputs(0), empty_state(stream)
    with use_backend(backend):
        compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(flat(compiled(*inputs)), flat(decode_step(*inputs)), rtol=1e-6, atol=1e-6)


@every_backend
def test_decode_operator(backend: str) -> None:
    stream = make(1)
    state = empty_state(stream)
    inner = (2, 2, 1, 2, 1, 2, 1, 2, 2, 1)
    tensors = (*stream.inputs(0), *state)
    folded = [_fold(t, state.lse.shape[:-1], n) for t, n in zip(tensors, inner, strict=True)]
    torch.library.opcheck(_step, (*folded, backend), test_utils=("test_schema", "test_faketensor"))


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("slots", "dim"), [(256, 64), (64, 128), (1000, 80), (256, 256)])
def test_decode_on_a_gpu(slots: int, dim: int, dtype: torch.dtype) -> None:
    stream = make(20, (8, 12), slots, dim, dim, dtype=dtype, scale=dim**-0.5, device="cuda")
    found, best = run(stream, "triton"), exact(stream)
    assert_close(found, best, limit=1e-5 if dtype == torch.float32 else 1e-2)
