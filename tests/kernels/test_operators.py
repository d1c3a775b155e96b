"""Every operator of torch: what `torch.library.opcheck` asks for, `vmap`, and derivatives that exist or raise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_linattn.errors import UnsupportedError
from hf_linattn.kernels import operators as registration
from hf_linattn.kernels.attend import attend
from hf_linattn.kernels.block_slots import BlockReach, inter_block_attention
from hf_linattn.kernels.causal_slots import causal_slot_attention
from hf_linattn.kernels.decode import decode_step
from hf_linattn.kernels.half_norm import half_norm
from hf_linattn.kernels.slot_inputs import SlotInputs
from hf_linattn.kernels.window_chunks import window_chunk_attention

OPERATORS = torch.ops.hf_linattn
INF = float("inf")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = [(3, dtype) for dtype in DTYPES] + [(1, torch.float32)]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of biases and log masses."""
    return torch.promote_types(dtype, torch.float32)


# -- arguments of the operators, groups first ------------------------------------------------------------------------


def attend_case(tokens: int, dtype: torch.dtype, *, bias: bool = True, visible: bool = True) -> tuple[Any, ...]:
    """Three keys; one is hidden from all, and one query sees nothing."""
    seen = torch.ones(2, 3, tokens, 3, dtype=torch.bool)
    seen[0, 0, 0] = False
    key_bias = random(2, 3, 3, seed=3, dtype=wide(dtype))
    key_bias[:, :, 1] = -INF
    return (
        random(2, 3, tokens, 4, seed=0, dtype=dtype),
        random(2, 3, 3, 4, seed=1, dtype=dtype),
        random(2, 3, 3, 5, seed=2, dtype=dtype),
        key_bias if bias else None,
        seen if visible else None,
        "torch",
    )


def blocks_case(tokens: int, dtype: torch.dtype, reach: tuple[int, int, int] = (1, 0, 1)) -> tuple[Any, ...]:
    """Blocks of two queries, as many as tokens, and the units that they need."""
    units = tokens * reach[0]
    masks = random(2, units, 3, seed=4, dtype=wide(dtype))
    masks[0, 0] = -INF
    return (
        random(2, tokens, 2, 4, seed=0, dtype=dtype),
        random(2, 6, 4, seed=1, dtype=dtype),
        random(2, 6, seed=2, dtype=wide(dtype)),
        random(2, units, 3, 4, seed=3, dtype=dtype),
        masks,
        random(2, 6, 4, seed=5, dtype=dtype),
        random(2, 6, seed=6, dtype=wide(dtype)),
        random(2, units, 3, 5, seed=7, dtype=dtype),
        list(reach),
        "torch",
    )


def causal_case(tokens: int, dtype: torch.dtype, chunk: int = 4) -> tuple[Any, ...]:
    key_bias = random(2, tokens, seed=5, dtype=wide(dtype))
    key_bias[1, 0] = -INF
    return (
        random(2, tokens, 4, seed=0, dtype=dtype),
        random(2, 6, 4, seed=2, dtype=dtype),
        random(2, 6, seed=3, dtype=wide(dtype)),
        random(2, tokens, 4, seed=4, dtype=dtype),
        key_bias,
        random(2, 6, 4, seed=6, dtype=dtype),
        random(2, 6, seed=7, dtype=wide(dtype)),
        random(2, tokens, 5, seed=8, dtype=dtype),
        chunk,
        "torch",
    )


def window_chunks_case(
    tokens: int, dtype: torch.dtype, *, visible: bool = True, is_causal: bool = False
) -> tuple[Any, ...]:
    """Windows of three queries and four keys, as many as tokens, and two chunks."""
    seen = torch.ones(2, tokens, 3, 4, dtype=torch.bool)
    seen[0, 0] = False
    bias = random(2, 2, seed=4, dtype=wide(dtype))
    bias[0, 1] = -INF
    number = torch.arange(tokens).expand(2, -1)
    return (
        random(2, tokens, 3, 4, seed=0, dtype=dtype),
        random(2, tokens, 4, 4, seed=1, dtype=dtype),
        random(2, tokens, 4, 5, seed=2, dtype=dtype),
        seen if visible else None,
        random(2, 2, 4, seed=3, dtype=dtype),
        bias,
        random(2, 2, 5, seed=5, dtype=dtype),
        number % 3,
        number % 3 + 1,
        is_causal,
        "torch",
    )


def decode_case(tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    assert decode_step  # its operator is defined where it is imported
    state = wide(dtype)
    shapes = [(1, 4), (6, 4), (6,), (1, 4), (1,), (6, 4), (6,), (1, 5), (6, 5), (6,)]
    return (
        *(
            random(tokens, 3, *shape, seed=i, dtype=dtype if i in (0, 1, 3, 5, 7) else state)
            for i, shape in enumerate(shapes)
        ),
        "torch",
    )


def half_norm_case(tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    assert half_norm  # its operator is defined where it is imported
    return random(tokens, 2, 3, 4, seed=0, dtype=dtype), "torch"


CASES: dict[str, tuple[str, Callable[[int, torch.dtype], tuple[Any, ...]]]] = {
    "attend": ("attend", attend_case),
    "attend without bias": ("attend", lambda n, d: attend_case(n, d, bias=False)),
    "attend without visible": ("attend", lambda n, d: attend_case(n, d, visible=False)),
    "attend plain": ("attend", lambda n, d: attend_case(n, d, bias=False, visible=False)),
    "blocks causal": ("blocks", blocks_case),
    "blocks elsewhere": ("blocks", lambda n, d: blocks_case(n, d, (1, 0, 0))),
    "blocks overlapping": ("blocks", lambda n, d: blocks_case(n, d, (2, 1, 0))),
    "causal": ("causal", causal_case),
    "causal one by one": ("causal", lambda n, d: causal_case(n, d, 1)),
    "windows": ("window_chunks", window_chunks_case),
    "windows causal": ("window_chunks", lambda n, d: window_chunks_case(n, d, visible=False, is_causal=True)),
    "decode": ("decode_step", decode_case),
    "half_norm": ("half_norm", half_norm_case),
}
# Of the differentiable ones: how many inputs have gradients, in the order of the backward operator's results.
GRADIENTS = {
    "attend": (0, 1, 2, 3),
    "blocks": tuple(range(8)),
    "causal": tuple(range(8)),
    "window_chunks": (0, 1, 2, 4, 5, 6),
}
every_case = pytest.mark.parametrize("name", CASES)
differentiable_case = pytest.mark.parametrize("name", [name for name, (op, _) in CASES.items() if op in GRADIENTS])


def operator_of(name: str, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Any, str, tuple[Any, ...]]:
    operator, build = CASES[name]
    return getattr(OPERATORS, operator).default, operator, build(tokens, dtype)


def needed(operator: str, arguments: tuple[Any, ...], *, all_of_them: bool = True) -> list[bool]:
    """All gradients that there can be, or every second one."""
    return [
        arguments[place] is not None and (all_of_them or number % 2 == 0)
        for number, place in enumerate(GRADIENTS[operator])
    ]


def backward_of(
    name: str, tokens: int, dtype: torch.dtype, *, all_of_them: bool = True
) -> tuple[Any, tuple[Any, ...]]:
    """The backward operator and its arguments."""
    forward, operator, arguments = operator_of(name, tokens, dtype)
    results = forward(*arguments)
    grads = [random(*z.shape, seed=20 + i, dtype=z.dtype) for i, z in enumerate(results[:2])]
    tensors = [z for z in arguments if isinstance(z, Tensor) or z is None]
    options = [z for z in arguments if not (isinstance(z, Tensor) or z is None)]
    needs = needed(operator, arguments, all_of_them=all_of_them)
    return getattr(OPERATORS, f"{operator}_backward").default, (*grads, *tensors, *results, needs, *options)


def test_every_operator_is_here() -> None:
    known = {op for op, _ in CASES.values()} | {f"{op}_backward" for op in GRADIENTS}
    defined = {name.split("::")[1] for name in registration._LIBRARY._op_defs}
    assert {name.split(".")[0] for name in defined} == known


# -- what torch asks for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "dtype"), SIZES, ids=str)
@every_case
def test_opcheck(name: str, tokens: int, dtype: torch.dtype) -> None:
    operator, _, arguments = operator_of(name, tokens, dtype)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("all_of_them", [True, False], ids=["all", "some"])
@pytest.mark.parametrize(("tokens", "dtype"), SIZES, ids=str)
@differentiable_case
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


# -- derivatives of the functions around them -----------------------------------------------------------------------


def _attend(*tensors: Tensor) -> Any:
    return attend(tensors[0], tensors[1], tensors[2], bias=tensors[3])


def _blocks(*tensors: Tensor) -> Any:
    return inter_block_attention(_one_row(*tensors), BlockReach(is_causal=True))


def _causal(*tensors: Tensor) -> Any:
    return causal_slot_attention(_one_row(*tensors), 4)


def _one_row(*tensors: Tensor) -> SlotInputs:
    return SlotInputs(*(z.unsqueeze(0) if place in (0, 3, 4, 7) else z for place, z in enumerate(tensors)))


def _window_chunks(*tensors: Tensor) -> Any:
    number = torch.arange(3)
    return window_chunk_attention(*tensors[:3], None, False, *tensors[3:], number % 3, number % 3 + 1)


FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "attend": (_attend, "attend without visible"),
    "blocks": (_blocks, "blocks causal"),
    "causal": (_causal, "causal"),
    "window_chunks": (_window_chunks, "windows"),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def function_of(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A scalar that depends on output and log mass in a way that is not linear, and tensors to call it with."""
    function, case = FUNCTIONS[name]
    arguments = operator_of(case, 3)[2]

    def scalar(*tensors: Tensor) -> Tensor:
        found = function(*tensors)
        mass = found.lse.masked_fill(found.lse == -INF, 0.0)
        return found.output.square().sum() + mass.sin().sum()

    return scalar, [arguments[place] for place in GRADIENTS[name]]


def plain_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [z.clone().requires_grad_() for z in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


@every_function
def test_gradients_by_torch_func(name: str) -> None:
    function, tensors = function_of(name)
    every = tuple(range(len(tensors)))
    expected = plain_gradients(function, tensors)
    for ours, theirs in zip(torch.func.grad(function, argnums=every)(*tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    rows = [[z * (1 + i / 4) for z in tensors] for i in range(2)]
    batched = [torch.stack(z) for z in zip(*rows, strict=True)]
    found = torch.func.vmap(torch.func.grad(function, argnums=every))(*batched)
    outer = torch.func.grad(lambda *z: torch.func.vmap(function)(*z).sum(), argnums=every)(*batched)
    for i, row in enumerate(rows):
        for ours, other, theirs in zip(found, outer, plain_gradients(function, row), strict=True):
            torch.testing.assert_close(ours[i], theirs)
            torch.testing.assert_close(other[i], theirs)


@every_function
def test_jacobian_is_that_of_finite_differences(name: str) -> None:
    """`jacrev` runs the backward operator under `vmap`."""
    function, tensors = function_of(name)
    body, direction, step = FUNCTIONS[name][0], random(*tensors[0].shape, seed=9), 1e-6
    jacobian = torch.func.jacrev(lambda query: body(query, *tensors[1:]).output)(tensors[0])
    found = (jacobian * direction).flatten(-direction.ndim).sum(-1)
    ahead, behind = (body(tensors[0] + sign * step * direction, *tensors[1:]).output for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    assert function(*tensors).isfinite()


def second_derivatives(function: Callable[..., Tensor], tensors: list[Tensor]) -> Iterator[tuple[str, Any]]:
    """Ways to ask for more than a first derivative in reverse mode, with respect to each of the tensors."""
    for place in range(len(tensors)):

        def one(z: Tensor, place: int = place) -> Tensor:
            return function(*tensors[:place], z, *tensors[place + 1 :])

        z = tensors[place]
        direction = torch.ones_like(z)

        def penalty(z: Tensor = z, one: Any = one) -> Any:
            leaf = z.clone().requires_grad_()
            (grad,) = torch.autograd.grad(
                one(leaf) + leaf.masked_fill(leaf == -INF, 0).pow(3).sum(), leaf, create_graph=True
            )
            return torch.autograd.grad(grad.square().sum(), leaf, allow_unused=True)

        yield "penalty", penalty
        yield "grad of grad", lambda z=z, one=one: torch.func.grad(lambda z: torch.func.grad(one)(z).sum())(z)
        yield (
            "vmap of grad of grad",
            lambda z=z, one=one: torch.func.vmap(torch.func.grad(lambda z: torch.func.grad(one)(z).sum()))(
                torch.stack([z, z])
            ),
        )
        yield "jacrev twice", lambda z=z, one=one: torch.func.jacrev(torch.func.jacrev(one))(z)
        yield "hessian", lambda z=z, one=one: torch.autograd.functional.hessian(one, z)
        yield "jvp", lambda z=z, one=one, d=direction: torch.func.jvp(one, (z,), (d,))
        yield "jvp by reverse mode", lambda z=z, one=one, d=direction: torch.autograd.functional.jvp(one, z, d)


@every_function
def test_other_derivatives_raise(name: str) -> None:
    """Torch takes what it cannot differentiate for a constant: they would silently be 0, or miss a term."""
    for what, compute in second_derivatives(*function_of(name)):
        with pytest.raises(NotImplementedError, match="first derivatives only|jvp function"):
            print(what, compute())


def test_second_derivative_of_outputs_that_are_used_linearly() -> None:
    """Then the gradient depends on the inputs alone, not on the gradient that comes in."""
    tensors = [z.clone().requires_grad_() for z in function_of("attend")[1]]
    grad = torch.autograd.grad(_attend(*tensors).output.sum(), tensors[:1], create_graph=True)[0]
    with pytest.raises(UnsupportedError, match="first derivatives only"):
        grad.square().sum().backward()


def test_operator_by_itself_has_the_derivative() -> None:
    """An exported program calls operators, not the functions around them."""
    for name in GRADIENTS:
        body, case = FUNCTIONS[name]
        operator, _, arguments = operator_of(case, 3)
        leaves = [z.clone().requires_grad_() if place in GRADIENTS[name] else z for place, z in enumerate(arguments)]
        differentiated = [leaves[place] for place in GRADIENTS[name]]
        if name == "window_chunks":
            leaves[3] = None
            leaves[7], leaves[8] = (torch.arange(3) % 3).expand(2, -1), (torch.arange(3) % 3 + 1).expand(2, -1)
        output, mass = operator(*leaves)[:2]
        grads = random(*output.shape, seed=31), random(*mass.shape, seed=32)
        found = torch.autograd.grad((output, mass), differentiated, grads)
        again = body(*differentiated)
        shaped = [g.reshape(z.shape) for g, z in zip(grads, again, strict=True)]
        for ours, theirs in zip(found, torch.autograd.grad(tuple(again), differentiated, shaped), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_decoding_has_no_derivative() -> None:
    operator, _, arguments = operator_of("decode", 2)
    inputs = [z.clone().requires_grad_() if isinstance(z, Tensor) else z for z in arguments]
    with pytest.raises(UnsupportedError, match="decoding steps have none"):
        operator(*inputs)[0].sum().backward()


@pytest.mark.parametrize(("name", "requires"), list(itertools.product(GRADIENTS, range(9))))
def test_single_gradients(name: str, requires: int) -> None:
    """Of one input alone, as if the others were constants: the same numbers as of all."""
    function, tensors = function_of(name)
    if requires >= len(tensors):
        return
    expected = plain_gradients(function, tensors)[requires]
    leaf = tensors[requires].clone().requires_grad_()
    found = torch.autograd.grad(function(*tensors[:requires], leaf, *tensors[requires + 1 :]), leaf)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
