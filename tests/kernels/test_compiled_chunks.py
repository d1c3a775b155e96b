"""Short EVA in C gives what the formulas in float64 give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from operator_cases import random
from torch import Tensor

from hf_linattn.kernels.backends import use_backend
from hf_linattn.kernels.native import build
from hf_linattn.kernels.short_chunks import native_kernel, short_pooled, short_variates, torch_kernel
from hf_linattn.kernels.short_chunks.cutting import Sizes

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="no C compiler")

HEADS = 3
KINDS = [
    ("sum", True),
    ("sum", False),
    ("mean", True),
    ("mean", False),
    ("key", True),
    ("none", True),
    ("learned", True),
]


def case(
    kind: str,
    tokens: int,
    sizes: Sizes,
    *,
    with_maps: bool = True,
    batch: int = 2,
    dim: int = 20,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], str, Sizes]:
    """Queries, keys and values as they come from a projection, and maps."""
    found = [random(batch, tokens, HEADS, dim, seed=i, dtype=dtype).transpose(1, 2) for i in range(3)]
    square, row = (HEADS, dim, dim), (HEADS, dim)
    shapes = [row, row, square, square, (HEADS,), row, row] if kind == "learned" else [square, square] * with_maps
    for i, shape in enumerate(shapes):
        found.append(random(*shape, seed=3 + i, dtype=dtype) * (0.5 * dim**-0.5 if shape == square else 0.5))
    return found, kind, sizes


def step(tensors: list[Tensor], kind: str, sizes: Sizes, upstream: bool = True) -> list[Tensor]:
    """Output, log-sum-exp and all gradients, zeros for tokens that are not real."""
    leaves = [z.detach().requires_grad_() for z in tensors]
    if kind == "learned":
        output, lse = short_pooled(*leaves[:3], leaves[3:], sizes)
    else:
        maps = leaves[3:] or [None, None]
        output, lse = short_variates(*leaves[:3], maps[0], maps[1], kind, sizes)
    if sizes.lengths:
        padding = torch.arange(output.shape[2]) >= torch.tensor(sizes.lengths)[:, None, None]
        output, lse = output.masked_fill(padding[..., None], 0.0), lse.masked_fill(padding, 0.0)
    grads = [random(*z.shape, seed=20 + i, dtype=z.dtype) for i, z in enumerate((output, lse))]
    used = [(output, grads[0])] + [(lse, grads[1])] * upstream
    found = torch.autograd.grad([z for z, _ in used], leaves, [g for _, g in used], allow_unused=True)
    return [
        output.detach(),
        lse.detach(),
        *(torch.zeros_like(z) if g is None else g for z, g in zip(leaves, found, strict=True)),
    ]


@pytest.fixture
def only_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not float64 fails in torch."""
    own = torch_kernel.Reading

    def check(tokens: list[Tensor], *others: Any) -> Any:
        assert tokens[0].dtype == torch.float64
        return own(tokens, *others)

    monkeypatch.setattr(torch_kernel, "Reading", check)


def assert_right(tensors: list[Tensor], kind: str, sizes: Sizes, tolerance: float = 1e-5, **others: Any) -> None:
    found = step(tensors, kind, sizes, **others)
    expected = step([z.double() for z in tensors], kind, sizes, **others)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        assert float((ours - exact).abs().max()) <= tolerance * max(1.0, float(exact.abs().max()))


# Tokens, window, chunk: parts of windows and chunks, chunks of one token, of a window, and longer; odd sizes.
LAYOUTS = [(128, 32, 2), (100, 32, 8), (50, 7, 7), (50, 7, 21), (37, 10, 5), (33, 4, 1), (19, 16, 16), (70, 5, 20)]


@pytest.mark.parametrize(("kind", "with_maps"), KINDS)
@pytest.mark.parametrize(("tokens", "window", "chunk"), LAYOUTS)
@pytest.mark.usefixtures("only_c")
def test_sequences(kind: str, with_maps: bool, tokens: int, window: int, chunk: int) -> None:
    first = 3 * (tokens < 40)
    sizes = Sizes(window, chunk, tokens != 50, 0.2, num_global=first)
    assert_right(*case(kind, tokens + first, sizes, with_maps=with_maps), upstream=tokens != 100)


@pytest.mark.parametrize("dim", [1, 4, 20, 64])
@pytest.mark.parametrize("kind", ["mean", "learned"])
@pytest.mark.usefixtures("only_c")
def test_head_dimensions(kind: str, dim: int) -> None:
    assert_right(*case(kind, 45, Sizes(8, 4, True, dim**-0.5), dim=dim))


@pytest.mark.parametrize(("kind", "with_maps"), KINDS)
@pytest.mark.parametrize(
    ("grid", "window", "chunk", "first"),
    [((14, 14), 7, 7, 1), ((4, 6), 2, 4, 0), ((5, 7), 4, 2, 2), ((9, 2), 3, 1, 20)],
)
@pytest.mark.usefixtures("only_c")
def test_images(kind: str, with_maps: bool, grid: tuple[int, int], window: int, chunk: int, first: int) -> None:
    sizes = Sizes(window, chunk, True, 0.2, *grid, first)
    assert_right(*case(kind, grid[0] * grid[1] + first, sizes, with_maps=with_maps))


@pytest.mark.parametrize(("kind", "with_maps"), KINDS)
@pytest.mark.parametrize(
    ("lengths", "chunks"), [((50, 17, 3), (4, 4, 4)), ((50, 37, 0), (16, 16, 16)), ((44, 20, 9), (8, 4, 1))]
)
@pytest.mark.usefixtures("only_c")
def test_padding(kind: str, with_maps: bool, lengths: tuple[int, ...], chunks: tuple[int, ...]) -> None:
    """What tokens that are not real hold is read by nobody."""
    sizes = Sizes(8, max(chunks), True, 0.2, 0, 0, 0, lengths, chunks)
    tensors, *rest = case(kind, 50, sizes, with_maps=with_maps, batch=3)
    padding = torch.arange(50) >= torch.tensor(lengths)[:, None, None]
    tensors[:3] = [z.masked_fill(padding[..., None], 0.0) for z in tensors[:3]]
    assert_right(tensors, *rest)
    garbage = [z.masked_fill(padding[..., None], 1e30) for z in tensors[:3]] + tensors[3:]
    assert all(map(torch.equal, step(tensors, *rest), step(garbage, *rest)))


@pytest.mark.parametrize("kind", ["sum", "learned"])
@pytest.mark.usefixtures("only_c")
def test_large_logits(kind: str) -> None:
    """Of hundreds, where a query's gradient cancels what all keys have in common."""
    tensors, *rest = case(kind, 45, Sizes(8, 4, True, 0.2))
    for z in tensors[:2]:
        z += 8.0
    if kind == "learned":
        tensors[4] *= 20.0
    assert_right(tensors, *rest, tolerance=2e-4)


@pytest.mark.usefixtures("only_c")
def test_summaries_without_mass() -> None:
    """An offset of -inf leaves a head with its windows."""
    tensors, *rest = case("learned", 45, Sizes(8, 4, True, 0.2))
    tensors[7][0] = -torch.inf
    assert_right(tensors, *rest)
    query, key, value = (z[:, :1, :8] for z in tensors[:3])
    expected = torch.softmax(query @ key.mT * 0.2, -1) @ value
    torch.testing.assert_close(step(tensors, *rest)[0][:, :1, :8], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sum", "learned"])
@pytest.mark.usefixtures("only_c")
def test_halves(kind: str, dtype: torch.dtype) -> None:
    tensors, *rest = case(kind, 45, Sizes(8, 4, True, 0.2), dtype=dtype)
    found, expected = step(tensors, *rest), step([z.double() for z in tensors], *rest)
    assert [z.dtype for z in found] == [dtype, torch.float32, *[dtype] * len(tensors)]
    for ours, exact in zip(found, expected, strict=True):
        assert float((ours - exact).abs().max()) <= 0.02 * float(exact.abs().max())


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("kind", ["sum", "none", "learned"])
def test_what_is_no_number_is_seen(kind: str, name: str) -> None:
    tensors, *rest = case(kind, 45, Sizes(8, 4, True, 0.2))
    tensors[["query", "key", "value"].index(name)][0, 1, 11, 3] = torch.nan
    seen = step(tensors, *rest)[0].isnan().any(-1)
    assert seen[0, 1, 11]
    assert not seen[1].any()
    assert not seen[0, [0, 2]].any()
    if name != "query" or kind == "sum":  # its chunk is broken as well, which all other windows read
        assert seen[0, 1, :8].all()
        assert seen[0, 1, 16:].all()


@pytest.mark.parametrize("kind", ["sum", "learned"])
def test_threads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread has whole rows and heads: the same to the last bit."""
    monkeypatch.setattr("hf_linattn.kernels.native.calls._LEAST", 1.0)
    given, before = case(kind, 45, Sizes(8, 4, True, 0.2)), torch.get_num_threads()
    expected = step(*given)
    torch.set_num_threads(3)
    try:
        found = step(*given)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.usefixtures("only_c")
def test_every_size_of_vectors(capability: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.backends.cpu.get_cpu_capability()
    if own not in ("AVX512", "AVX2") and capability != "DEFAULT" or own == "AVX2" and capability == "AVX512":
        pytest.skip(f"this processor has {own}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for kind in ("mean", "learned"):
        assert_right(*case(kind, 47, Sizes(6, 3, True, 0.2, num_global=2)))
    assert len(list(fresh.glob("*.so"))) == 1


def test_who_computes(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64, windows that leave most of a vector idle, and what is asked to be torch are torch's."""
    calls: list[torch.dtype] = []
    own = native_kernel.NativeReading._run

    def spy(reading: native_kernel.NativeReading, *others: Any) -> None:
        calls.append(reading.tokens[0].dtype)
        own(reading, *others)

    monkeypatch.setattr(native_kernel.NativeReading, "_run", spy)
    for dtype in (torch.float32, torch.bfloat16):
        step(*case("sum", 45, Sizes(8, 4, True, 0.2), dtype=dtype))
        assert calls == [torch.float32] * 2  # forward and backward
        calls.clear()
    step(*case("sum", 45, Sizes(8, 4, True, 0.2), dtype=torch.float64))
    step(*case("sum", 45, Sizes(2, 4, True, 0.2)))
    with use_backend("torch"):
        step(*case("sum", 45, Sizes(8, 4, True, 0.2)))
    monkeypatch.setenv("HF_LINATTN_COMPILE", "0")
    build.library.cache_clear()
    step(*case("learned", 45, Sizes(8, 4, True, 0.2)))
    assert not calls


@pytest.mark.parametrize(
    ("kind", "wrong"), [("sum", 1), ("sum", 2), ("sum", 4), *(("learned", i) for i in range(3, 10))]
)
def test_tensors_of_other_shapes(kind: str, wrong: int) -> None:
    """C would read what is not theirs; torch raises."""
    tensors, *rest = case(kind, 45, Sizes(8, 4, True, 0.2))
    tensors[wrong] = tensors[wrong][:, :, 1:] if wrong < 3 else tensors[wrong].repeat_interleave(2, -1)
    with pytest.raises(RuntimeError):
        step(tensors, *rest)
