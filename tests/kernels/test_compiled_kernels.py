"""C kernels: how they are compiled, what they share, and that they do the work where they should."""

from __future__ import annotations

import ctypes
import logging
import platform
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import in_processes
from hypothesis import given
from hypothesis import strategies as st
from references import assert_same
from torch import Tensor

from hf_linattn.kernels.backends import use_backend
from hf_linattn.kernels.native import build
from hf_linattn.kernels.row_fit import fits_in_c
from hf_linattn.kernels.short_slots import native_kernel, short_slot_attention, torch_kernel
from hf_linattn.kernels.short_slots.inputs import ShortInputs, ShortOptions
from hf_linattn.ops.favor import fitted

needs_compiler = pytest.mark.skipif(build._compiler() is None, reason="no C compiler")
OPTIONS = ShortOptions(8, (), 0.5, 1.0, 1.0)


def inputs(tokens: int = 45, dim: int = 20, slots: int = 18, dtype: torch.dtype = torch.float32) -> ShortInputs:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, tokens, 3, dim).to(dtype) for _ in range(3))
    maps = [torch.randn(1, 3, slots, dim).to(dtype) for _ in range(2)]
    return ShortInputs(query, key, value, None, None, None, None, maps[0], None, maps[1], None)


def step(given: ShortInputs, options: ShortOptions = OPTIONS) -> list[Tensor]:
    """Output, log-sum-exp and all gradients."""
    leaves = ShortInputs(*[None if z is None else z.clone().requires_grad_() for z in given])
    found = short_slot_attention(leaves, options)
    wanted = [z for z in leaves if z is not None]
    return [*found, *torch.autograd.grad(found.output.float().square().sum() + found.lse.sum(), wanted)]


@pytest.fixture
def torch_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What runs in torch."""
    found: list[str] = []
    for name in ("short_forward", "short_backward"):
        own = getattr(torch_kernel, name)

        def spy(*args: Any, own: Any = own, name: str = name) -> Any:
            found.append(name)
            return own(*args)

        monkeypatch.setattr(torch_kernel, name, spy)
    return found


# -- compiling --------------------------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_every_size_of_vectors(
    capability: str, fresh: Path, torch_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = torch.backends.cpu.get_cpu_capability()
    if own not in ("AVX512", "AVX2") and capability != "DEFAULT" or own == "AVX2" and capability == "AVX512":
        pytest.skip(f"this processor has {own}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = step(inputs())
    assert not torch_calls
    assert len(list(fresh.glob("*.so"))) == 1
    with use_backend("torch"):
        torch.testing.assert_close(found, step(inputs(dtype=torch.float64)), check_dtype=False, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_a_compiled_kernel_is_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.library(native_kernel._SOURCE)
    (kept,) = fresh.iterdir()
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    build.library.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.library(native_kernel._SOURCE) is not None
    assert list(fresh.iterdir()) == [kept]


@needs_compiler
@pytest.mark.parametrize("left", [0, 100, 20_000])
def test_a_damaged_file_is_compiled_again(left: int, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading what a power failure has cut off would end the process."""
    build.library(native_kernel._SOURCE)
    (kept,) = fresh.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # it is loaded: not to be changed
    kept.write_bytes(whole[:left])
    build.library.cache_clear()
    assert build.library(native_kernel._SOURCE) is not None
    assert kept.read_bytes() == whole


@needs_compiler
def test_a_compiler_that_cannot_be_read_or_found(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ('gcc "', "no-such-compiler -O1", " "):
        monkeypatch.setenv("CC", command)
        assert build._compiler() is not None


@needs_compiler
def test_nobody_has_a_home(fresh: Path, torch_calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("HF_LINATTN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    step(inputs())
    assert not torch_calls


@needs_compiler
def test_processes_that_compile_at_the_same_time(fresh: Path, tmp_path: Path) -> None:
    def work() -> dict[str, Tensor]:
        return {"found": torch.tensor(build.library(native_kernel._SOURCE) is not None)}

    assert all(found["found"] for found in in_processes(tmp_path / "processes", 2, work))
    assert len(list(fresh.iterdir())) == 1


@pytest.mark.parametrize("why", ["asked for", "no compiler", "compiler fails", "folder cannot be written"])
def test_without_a_compiled_kernel(
    why: str, fresh: Path, torch_calls: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hf_linattn")
    if why == "asked for":
        monkeypatch.setenv("HF_LINATTN_COMPILE", "0")
    elif why == "no compiler":
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CC", raising=False)
    elif why == "compiler fails":
        monkeypatch.setenv("CC", "false")
    else:
        fresh.write_text("a file")
    step(inputs())
    if why == "folder cannot be written" and build._compiler() is not None:
        assert not torch_calls  # another folder was taken
        assert "could not be compiled into" in caplog.text
        return
    assert torch_calls == ["short_forward", "short_backward"]
    told = {"asked for": "", "no compiler": "No C compiler was found", "compiler fails": "could not be compiled"}
    assert told.get(why, "") in caplog.text


# -- what kernels share -----------------------------------------------------------------------------------------------
PARTS = """
#include "arithmetic.h"
void exponentials(float *x, long count) {
    for (long i = 0; i < count; i += LANES) store(x + i, exponential(load(x + i)));
}
void products(float *a, float *b, float *c, long rows, long columns, long depth, long is_turned) {
    Left left = is_turned ? columns_of(a, rows) : rows_of(a, depth);
    product(rows, columns, depth, left, b, columns, c, columns);
    add_product(rows, columns, depth, left, b, columns, c, columns);
}
void transposed(float *a, float *b, long rows, long columns, long width) {
    transpose(rows, columns, a, padded(columns), b, width);
}
"""
LANES = 16  # at most


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = tmp_path_factory.mktemp("parts") / "parts.c"
    source.write_text(PARTS)
    found = build.library(source)
    if found is None:
        pytest.skip("no C compiler")
    return found


def at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def test_exponential(shared: ctypes.CDLL) -> None:
    x = torch.linspace(-100.0, 80.0, 1 << 16)
    x[:5] = torch.tensor([-torch.inf, torch.nan, 0.0, -1e30, -87.33])
    expected = x.double().exp()
    found = x.clone()
    shared.exponentials(at(found), ctypes.c_long(len(x)))
    assert found[1].isnan()
    assert found[2] == 1
    is_some = x >= -87.33
    assert not found[~is_some & ~x.isnan() & (x < -87.34)].any()
    assert ((found.double() - expected) / expected)[is_some].abs().max() < 1.2e-7


sizes = st.integers(1, 37)


@given(sizes, sizes, sizes, st.booleans())
def test_products(shared: ctypes.CDLL, rows: int, columns: int, depth: int, is_turned: bool) -> None:
    width = -(-columns // LANES) * LANES
    a, b, found = torch.randn(rows, depth), torch.randn(depth, width), torch.empty(rows, width)
    left = a.T.contiguous() if is_turned else a
    shared.products(at(left), at(b), at(found), *map(ctypes.c_long, (rows, width, depth, is_turned)))
    torch.testing.assert_close(found, 2 * (a @ b), rtol=1e-4, atol=1e-4)


@given(sizes, sizes)
def test_transposition(shared: ctypes.CDLL, rows: int, columns: int) -> None:
    width = -(-rows // LANES) * LANES
    a, found = torch.randn(rows, -(-columns // LANES) * LANES), torch.empty(columns + 1, width).fill_(7.0)
    shared.transposed(at(a), at(found), *map(ctypes.c_long, (rows, columns, width)))
    assert torch.equal(found[:columns, :rows], a[:, :columns].T)
    assert not found[:columns, rows:].any()
    assert (found[columns] == 7).all()


# -- where they work --------------------------------------------------------------------------------------------------
@needs_compiler
def test_who_computes(torch_calls: list[str]) -> None:
    step(inputs())
    step(inputs(dtype=torch.bfloat16))
    assert not torch_calls
    with use_backend("torch"):
        step(inputs())
    step(inputs(dtype=torch.float64))
    large = inputs()
    step(large._replace(key=large.key * 3000))
    assert torch_calls == ["short_forward", "short_backward"] * 3


def test_any_strides() -> None:
    """Gaps, other orders of dimensions, and dimensions that are expanded."""

    def stretched(z: Tensor | None, number: int) -> Tensor | None:
        if z is None:
            return None
        wide = z.new_full((*z.shape[:-1], 2 * z.shape[-1]), torch.nan)
        wide[..., ::2] = z
        return wide[..., ::2] if number % 2 else z.movedim(-1, 0).contiguous().movedim(0, -1)

    plain = inputs()._replace(query_slot_bias=torch.randn(1, 3, 18), key_slot_bias=torch.randn(1, 3, 18))
    plain = plain._replace(
        query_bias=torch.randn(2, 45, 1).expand(-1, -1, 3), key_bias=torch.randn(45, 3).expand(2, -1, -1)
    )
    given = ShortInputs(*[stretched(z, number) for number, z in enumerate(plain)])
    for found, expected in zip(
        short_slot_attention(given, OPTIONS), short_slot_attention(plain, OPTIONS), strict=True
    ):
        assert torch.equal(found, expected)
    value = plain.value.clone().requires_grad_()
    output, gradient = short_slot_attention(plain._replace(value=value), OPTIONS).output, torch.randn(20, 2, 45, 3)
    first, second = (
        torch.autograd.grad(output, value, z, retain_graph=True)[0]
        for z in (gradient.movedim(0, -1), gradient.movedim(0, -1).contiguous())
    )
    assert torch.equal(first, second)


@needs_compiler
@pytest.mark.parametrize("centring", [True, False])
@pytest.mark.parametrize("variant", ["saderf", "gerf"])
@pytest.mark.parametrize(("shape", "offset"), [((2, 3, 45, 20), 0.0), ((1, 2, 130, 17), 5.0), ((2, 2, 1, 5), 0.0)])
def test_fit_to_rows(shape: tuple[int, ...], offset: float, variant: str, centring: bool) -> None:
    """FAVOR#'s constants and tokens in their coordinates, against torch in float64; equal keys, and one of zeros."""
    torch.manual_seed(0)
    fit, (query, key) = fitted.RowFit(variant, centring), (torch.randn(2, *shape) + offset).unbind(0)
    key[:, 0] = 3.1
    key[..., 1] = 0.0
    assert fits_in_c(query, key)
    found = fitted._forward(query, key, None, None, fit)
    expected = fitted._forward(query.double(), key.double(), None, None, fit)
    for own, other in zip(found, expected, strict=True):
        assert own.shape == other.shape
        assert_same([own], [other], 2e-5)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_no_number_is_seen(name: str) -> None:
    broken = inputs()
    getattr(broken, name)[0, 11, 1, 3] = torch.nan
    output = short_slot_attention(broken, OPTIONS).output
    assert output[0, 11, 1].isnan().any()
    assert not output[1].isnan().any()


def test_the_gradient_of_a_log_sum_exp_beside_a_large_one() -> None:
    """It has its own digits: where one key is all that is seen, outputs have no gradient, however large they are."""
    given = inputs()
    bias = torch.full((2, 45, 3), -torch.inf)
    bias[:, 3] = 0.0
    query = given.query.clone().requires_grad_()
    given = given._replace(query=query, key_bias=bias, value=given.value * 1e5)
    found = short_slot_attention(given, OPTIONS._replace(has_hidden=True))
    of_lse = 0.3 * found.lse[:, :8].sum()  # of the window of that key
    both, alone = (
        torch.autograd.grad(loss, query, retain_graph=True)[0] for loss in (of_lse + found.output[:, :8].sum(), of_lse)
    )
    torch.testing.assert_close(both, alone, rtol=1e-6, atol=1e-6)


@needs_compiler
@pytest.mark.skipif(platform.system() != "Linux", reason="memory is read from /proc")
def test_memory_of_threads_that_end() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def work() -> None:
        short_slot_attention(given, OPTIONS._replace(places=32))

    given = inputs(2000, 64, 64)
    sizes = []
    for _ in range(25):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        sizes.append(resident())
    assert sizes[-1] - sizes[4] < 40 << 20  # 20 threads keep some 10 MiB each while they live


@needs_compiler
@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread has whole rows and heads: the same to the last bit."""
    monkeypatch.setattr("hf_linattn.kernels.native.calls._LEAST", 1.0)
    expected, before = step(inputs()), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = step(inputs())
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found, expected))


@needs_compiler
def test_a_fork_after_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_linattn.kernels.native.calls._LEAST", 1.0)
    given, before = inputs(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = short_slot_attention(given, OPTIONS).output
    finally:
        torch.set_num_threads(before)

    def work() -> dict[str, Tensor]:
        torch.set_num_threads(2)
        return {"output": short_slot_attention(given, OPTIONS).output}

    (found,) = in_processes(tmp_path, 1, work, launched=True)
    assert torch.equal(found["output"], expected)


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="of other processors nothing is known"
)
def test_instructions_are_those_of_torch() -> None:
    assert torch.backends.cpu.get_cpu_capability() in {*build._INSTRUCTIONS, "DEFAULT", "NO AVX"}
