"""Every operator of torch: what `torch.library.opcheck` asks for, and `vmap`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_cases import CASES, GRADIENTS, backward_of, differentiable_case, every_case, operator_of
from torch import Tensor

from hf_linattn.kernels import operators

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = [(3, dtype) for dtype in DTYPES] + [(1, torch.float32)]


def test_every_operator_is_here() -> None:
    known = {op for op, _ in CASES.values()} | {f"{op}_backward" for op in GRADIENTS}
    defined = {name.split("::")[1] for name in operators._LIBRARY._op_defs}
    assert {name.split(".")[0] for name in defined} == known


# -- what torch asks for ---------------------------------------------------------------------------------------------


def rotated(names: list[str], ways: list[tuple[Any, ...]]) -> list[Any]:
    """Every name in every way; by default in one of them, which goes round, so that every way comes up.

    With float64 and gradients every name is in `test_opcheck_with_gradients`, and with every dtype its fake results
    are in `test_fake_results_are_like_real_ones`.
    """
    return [
        pytest.param(name, *way, marks=[] if (place - number) % len(ways) == 0 else pytest.mark.slow)
        for number, name in enumerate(names)
        for place, way in enumerate(ways)
    ]


@pytest.mark.parametrize(("name", "tokens", "dtype"), rotated(list(CASES), SIZES), ids=str)
def test_opcheck(name: str, tokens: int, dtype: torch.dtype) -> None:
    operator, _, arguments = operator_of(name, tokens, dtype)
    torch.library.opcheck(operator, arguments)


DIFFERENTIABLE = [name for name, (op, _) in CASES.items() if op in GRADIENTS]
OF_BACKWARD = [(*size, all_of_them) for size in SIZES for all_of_them in (True, False)]


@pytest.mark.parametrize(("name", "tokens", "dtype", "all_of_them"), rotated(DIFFERENTIABLE, OF_BACKWARD), ids=str)
def test_opcheck_of_backward(name: str, tokens: int, dtype: torch.dtype, all_of_them: bool) -> None:
    torch.library.opcheck(*backward_of(name, tokens, dtype, all_of_them=all_of_them))


@differentiable_case
def test_opcheck_with_gradients(name: str) -> None:
    """The forward operator by itself, as an exported program calls it, traced together with its derivative."""
    operator, operator_name, arguments = operator_of(name, 3)
    arguments = tuple(
        z.clone().requires_grad_() if place in GRADIENTS[operator_name] and z is not None else z
        for place, z in enumerate(arguments)
    )
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_fake_results_are_like_real_ones(name: str, dtype: torch.dtype) -> None:
    """Shape, dtype and strides, also of inputs whose strides are unusual."""
    operator, operator_name, arguments = operator_of(name, 65 if "windows" not in name else 5, dtype)
    calls = [(operator, arguments)]
    if operator_name in GRADIENTS:
        calls.append(backward_of(name, 5, dtype))
    for function, given in calls:
        strided = tuple(unusual(z) if isinstance(z, Tensor) else z for z in given)
        real = function(*strided)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = function(*(mode.from_tensor(z) if isinstance(z, Tensor) else z for z in strided))
        for ours, expected in zip(fake, real, strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (expected.shape, expected.dtype, expected.stride())


def unusual(z: Tensor) -> Tensor:
    """The same values, the last two dimensions exchanged in memory."""
    return z.mT.contiguous().mT if z.ndim > 1 else z


# -- vmap ------------------------------------------------------------------------------------------------------------


def stacked(arguments: tuple[Any, ...], size: int) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Floating-point tensors, every third shared, the others with a dimension for `vmap` at varying places."""
    found, dims = [], []
    for place, z in enumerate(arguments):
        if not isinstance(z, Tensor) or place % 3 == 2:
            found.append(z)
            dims.append(None)
        elif z.is_floating_point():
            dim = place % 2
            shift = torch.arange(size).to(z.dtype).reshape(-1, *[1] * z.ndim) / 4
            found.append((z + shift).movedim(0, dim))
            dims.append(dim)
        else:
            found.append(torch.stack([z] * size))
            dims.append(0)
    return tuple(found), tuple(dims)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@every_case
def test_vmap_is_a_loop(name: str, backward: bool) -> None:
    operator, operator_name, arguments = operator_of(name, 3)
    if backward:
        if operator_name not in GRADIENTS:
            return
        operator, arguments = backward_of(name, 3, torch.float64)
    batched, dims = stacked(arguments, 3)

    def number(i: int) -> tuple[Any, ...]:
        return tuple(z if dim is None else z.select(dim, i) for z, dim in zip(batched, dims, strict=True))

    variable = [place for place, dim in enumerate(dims) if dim is not None]

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        full = list(batched)
        for place, z in zip(variable, some, strict=True):
            full[place] = z
        return tuple(operator(*full))

    found = torch.func.vmap(function, in_dims=tuple(dims[i] for i in variable))(*(batched[i] for i in variable))
    for i in range(3):
        for ours, expected in zip(found, operator(*number(i)), strict=True):
            torch.testing.assert_close(ours[i], expected, rtol=1e-12, atol=1e-12)
