"""Which implementation runs: by name or not at all; only "auto" chooses. Whole attention functions agree."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from references import assert_same, cotangents, random
from torch import Tensor

import hf_linattn
from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import (
    current_backend,
    draw_projection,
    eva_attention,
    favor_attention,
    lara_attention,
    set_backend,
    softmax_attention,
    use_backend,
)
from hf_linattn.kernels import backends
from hf_linattn.kernels.attend import attend
from hf_linattn.kernels.block_slots import BlockReach, block_slot_attention
from hf_linattn.kernels.causal_slots import causal_slot_attention
from hf_linattn.kernels.slot_inputs import SlotInputs
from hf_linattn.kernels.window_chunks import window_chunk_attention
from hf_linattn.ops.lara.proposals import CalibratedProposals

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_interpreter = pytest.mark.skipif(
    not backends.triton_interpreted() or importlib.util.find_spec("triton") is None,
    reason="Triton's interpreter is off",
)


@pytest.fixture(autouse=True)
def _auto() -> Any:
    set_backend("auto")
    yield
    set_backend("auto")


# -- names -----------------------------------------------------------------------------------------------------------


def test_backends_nest_and_are_restored() -> None:
    with use_backend("torch"):
        with use_backend("triton"):
            assert current_backend() == "triton"
        assert current_backend() == "torch"
        with pytest.raises(ZeroDivisionError), use_backend("auto"):
            raise ZeroDivisionError
        assert current_backend() == "torch"
    assert current_backend() == "auto"
    set_backend("torch")
    assert current_backend() == "torch"


def test_threads_do_not_see_each_other() -> None:
    seen: list[str] = []
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("triton"):
            entered.set()
            left.wait(10)
            seen.append(current_backend())

    thread = threading.Thread(target=other)
    with use_backend("torch"):
        thread.start()
        entered.wait(10)
        assert current_backend() == "torch"
    assert current_backend() == "auto"
    left.set()
    thread.join()
    assert seen == ["triton"]
    assert current_backend() == "auto"


def test_compiled_functions_see_the_choice() -> None:
    torch._dynamo.reset()
    tensors = [torch.ones(1, 1, 4, 2, dtype=torch.float64)] * 3
    compiled = torch.compile(lambda *z: softmax_attention(*z), fullgraph=True, backend="eager")
    compiled(*tensors)
    with use_backend("triton"), pytest.raises(UnsupportedError, match="got torch.float64"):
        compiled(*tensors)
    compiled(*tensors)


@pytest.mark.parametrize("choose", [set_backend, lambda name: use_backend(name).__enter__(), backends.check_backend])
@pytest.mark.parametrize("name", ["Triton", "cuda", "", None])
def test_unknown_names_are_refused(choose: Callable[[Any], Any], name: Any) -> None:
    with pytest.raises(InputError, match=r"\['auto', 'torch', 'triton'\]; got " + repr(name)):
        choose(name)
    assert current_backend() == "auto"


# -- what can run ----------------------------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> list[str]:
    """Lines that a new process prints, without Triton's interpreter unless asked for."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = str(Path(hf_linattn.__file__).parents[0])
    found = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout.splitlines()


IN_A_NEW_PROCESS = """
import sys, torch
from hf_linattn.errors import UnsupportedError
from hf_linattn.functional import current_backend, favor_attention
print(current_backend())
q, k, v = torch.randn(3, 1, 2, 9, 4)
favor_attention(q, k, v, torch.randn(2, 5, 4), window_size=3)
try:
    favor_attention(q, k, v, torch.randn(2, 5, 4), backend="triton")
except UnsupportedError as error:
    print(error)
print(any(name.startswith("hf_linattn.kernels") and "triton" in name for name in sys.modules))
"""
NEEDS_A_GPU = "backend='triton' cannot be used: it needs tensors on a GPU; got cpu. Use backend='auto' or 'torch'."


@needs_triton
@pytest.mark.slow
def test_triton_by_name_needs_a_gpu_in_a_new_process() -> None:
    """And "auto" goes on without importing a Triton kernel."""
    found = run_python(IN_A_NEW_PROCESS, CUDA_VISIBLE_DEVICES="")
    assert found == ["auto", NEEDS_A_GPU, "False"]


def test_triton_by_name_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *given: None if name == "triton" else find(name))
    x = torch.zeros(1, 1, 3, 4)
    with use_backend("triton"), pytest.raises(UnsupportedError, match=r"not installed \(pip install 'hf-linattn\["):
        attend(x, x, x)
    for name in ("auto", "torch"):
        with use_backend(name):
            assert not attend(x, x, x).output.any()


def test_triton_by_name_needs_its_dtypes() -> None:
    x = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    with (
        use_backend("triton"),
        pytest.raises(UnsupportedError, match=r"^backend=.triton. cannot be used.*got torch.float64"),
    ):
        attend(x, x, x)
    for name in ("auto", "torch"):
        with use_backend(name):
            assert attend(x, x, x).output.dtype == torch.float64


@needs_triton
def test_auto_takes_triton_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        dtype, is_cuda, device = torch.float32, True, torch.device("cuda")

    assert backends.runs_on_triton("auto", OnGpu())  # type: ignore[arg-type]
    assert backends.runs_on_triton("triton", OnGpu())  # type: ignore[arg-type]
    assert not backends.runs_on_triton("torch", OnGpu())  # type: ignore[arg-type]
    OnGpu.dtype = torch.float64
    assert not backends.runs_on_triton("auto", OnGpu())  # type: ignore[arg-type]
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for tests: by name only
    assert not backends.runs_on_triton("auto", torch.zeros(1))
    assert backends.runs_on_triton("triton", torch.zeros(1))


# -- each operator, forward and backward -----------------------------------------------------------------------------


def tokens(*shape: int, seed: int) -> Tensor:
    return random(*shape, seed=seed).float()


def _attend() -> tuple[Callable[..., Any], list[Tensor]]:
    return attend, [tokens(1, 1, 5, 4, seed=i) for i in range(3)]


def _blocks() -> tuple[Callable[..., Any], list[Tensor]]:
    shapes = [(1, 1, 3, 4, 4), (1, 5, 4), (1, 5), (1, 1, 3, 4, 4), (1, 1, 3, 4), (1, 5, 4), (1, 5), (1, 1, 3, 4, 4)]
    return lambda *z: block_slot_attention(SlotInputs(*z), BlockReach()), [
        tokens(*shape, seed=i) for i, shape in enumerate(shapes)
    ]


def _causal() -> tuple[Callable[..., Any], list[Tensor]]:
    shapes = [(1, 1, 20, 4), (1, 5, 4), (1, 5), (1, 1, 20, 4), (1, 1, 20), (1, 5, 4), (1, 5), (1, 1, 20, 4)]
    return lambda *z: causal_slot_attention(SlotInputs(*z), 16), [
        tokens(*shape, seed=i) for i, shape in enumerate(shapes)
    ]


def _window_chunks() -> tuple[Callable[..., Any], list[Tensor]]:
    shapes = [(1, 2, 3, 4)] * 3 + [(1, 5, 4), (1, 5), (1, 5, 4)]
    hidden = torch.tensor([0, 2]), torch.tensor([1, 4])
    given = [tokens(*shape, seed=i) for i, shape in enumerate(shapes)]
    return lambda *z: window_chunk_attention(*z[:3], None, False, *z[3:], *hidden), given


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What operators asked for, and whether they got Triton."""
    found: list[tuple[str, bool]] = []
    decide = backends.runs_on_triton

    def recorded(backend: str, tensor: Tensor) -> bool:
        found.append((backend, decide(backend, tensor)))
        return found[-1][1]

    monkeypatch.setattr("hf_linattn.kernels.operators.runs_on_triton", recorded)
    return found


@needs_interpreter
@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("build", [_attend, _blocks, _causal, _window_chunks])
def test_the_backward_pass_runs_where_the_forward_pass_ran(
    build: Callable[[], tuple[Callable[..., Any], list[Tensor]]], name: str, asked: list[tuple[str, bool]]
) -> None:
    """Whatever the backend is by then. And both give the same."""
    function, given = build()
    leaves = [z.requires_grad_() for z in given]
    other = "torch" if name == "triton" else "triton"
    with use_backend(name):
        result = function(*leaves)
    with use_backend(other):
        grads = cotangents(*result)
        found = torch.autograd.grad(tuple(result), leaves, grads)
        assert asked == [(name, name == "triton")] * 2
        again = function(*leaves)
        assert asked[2:] == [(other, other == "triton")]
    assert_same([*result, *found], [*again, *torch.autograd.grad(tuple(again), leaves, grads)], 2e-6)


# -- whole attention functions ---------------------------------------------------------------------------------------

TOKENS, DIM = 13, 4


def _proposals() -> CalibratedProposals:
    return CalibratedProposals(random(2, 3, DIM, seed=20).float(), random(2, 3, DIM, seed=21).float())


def _favor(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, **more: favor_attention(
        q, k, v, draw_projection(2, 5, DIM, seed=3).to(q), **options, **more
    )


KINDS: dict[str, Callable[..., Tensor]] = {
    "favor": _favor(),
    "favor causal": _favor(is_causal=True, chunk_size=16),
    "favor window": _favor(window_size=3),
    "favor overlapping window": _favor(window_size=4, overlap_window=True),
    "favor causal window": _favor(window_size=4, is_causal=True),
    "lara": lambda q, k, v, **more: lara_attention(q, k, v, num_landmarks=3, **more),
    "lara window": lambda q, k, v, **more: lara_attention(q, k, v, num_landmarks=3, window_size=4, **more),
    "lara causal": lambda q, k, v, **more: lara_attention(
        q, k, v, proposals=_proposals(), is_causal=True, chunk_size=16, **more
    ),
    "eva": lambda q, k, v, **more: eva_attention(q, k, v, window_size=4, num_chunks=3, **more),
    "eva causal": lambda q, k, v, **more: eva_attention(q, k, v, window_size=4, chunk_size=2, is_causal=True, **more),
    "eva overlapping window": lambda q, k, v, **more: eva_attention(
        q, k, v, window_size=4, num_chunks=3, overlap_window=True, **more
    ),
}


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_that_triton_needs_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tokens(1, 2, TOKENS, DIM, seed=i) for i in range(3)]
    expected = KINDS[kind](*inputs, backend="torch")
    torch.testing.assert_close(KINDS[kind](*inputs), expected)
    torch.testing.assert_close(KINDS[kind](*inputs, backend="auto"), expected)
    with pytest.raises(UnsupportedError, match=re.escape(NEEDS_A_GPU)):
        KINDS[kind](*inputs, backend="triton")
    with use_backend("triton"), pytest.raises(UnsupportedError, match=re.escape(NEEDS_A_GPU)):
        KINDS[kind](*inputs)


slow = {"favor overlapping window", "eva overlapping window", "lara window"}
every_kind = [pytest.param(kind, marks=pytest.mark.slow if kind in slow else ()) for kind in KINDS]


@needs_interpreter
@pytest.mark.parametrize("masked", [pytest.param(False, id="whole", marks=pytest.mark.slow), True])
@pytest.mark.parametrize("kind", every_kind)
def test_attention_functions_give_the_same(kind: str, masked: bool, asked: list[tuple[str, bool]]) -> None:
    inputs = [tokens(2, 2, TOKENS, DIM, seed=i).requires_grad_() for i in range(3)]
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [7]]) if masked else None

    def both(name: str) -> list[Tensor]:
        output = KINDS[kind](*inputs, key_mask=mask, backend=name)
        return [output, *torch.autograd.grad(output, inputs, random(*output.shape, seed=9).float())]

    found = both("triton")
    assert set(asked) == {("triton", True)}
    assert_same(found, both("torch"), 1e-4, ("output", "query", "key", "value"))
    assert asked[-1] == ("torch", False)
    assert all(z.isfinite().all() for z in found)
    assert found[0].any()
