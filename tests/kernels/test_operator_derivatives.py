"""Derivatives of the operators and of the functions around them: right, or an error where there are none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from operator_cases import GRADIENTS, INF, operator_of, random
from torch import Tensor

from hf_linattn.errors import UnsupportedError
from hf_linattn.kernels.attend import attend
from hf_linattn.kernels.block_slots import BlockReach, block_slot_attention
from hf_linattn.kernels.causal_slots import causal_slot_attention
from hf_linattn.kernels.short_chunks import short_pooled, short_variates
from hf_linattn.kernels.short_chunks.cutting import Sizes
from hf_linattn.kernels.short_slots import short_slot_attention
from hf_linattn.kernels.short_slots.inputs import ShortInputs, ShortOptions
from hf_linattn.kernels.slot_inputs import SlotInputs
from hf_linattn.kernels.window_chunks import window_chunk_attention


def _attend(*tensors: Tensor) -> Any:
    return attend(tensors[0], tensors[1], tensors[2], bias=tensors[3])


def _blocks(*tensors: Tensor) -> Any:
    return block_slot_attention(_one_row(*tensors), BlockReach(is_causal=True))


def _causal(*tensors: Tensor) -> Any:
    return causal_slot_attention(_one_row(*tensors), 4)


def _one_row(*tensors: Tensor) -> SlotInputs:
    return SlotInputs(*(z.unsqueeze(0) if place in (0, 3, 4, 7) else z for place, z in enumerate(tensors)))


def _window_chunks(*tensors: Tensor) -> Any:
    number = torch.arange(3)
    return window_chunk_attention(*tensors[:3], None, False, *tensors[3:], number % 3, number % 3 + 1)


def _short(*tensors: Tensor) -> Any:
    return short_slot_attention(ShortInputs(*tensors), ShortOptions(2, (), 0.7, 1.0, 0.5, -1.3, has_hidden=True))


SHORT = Sizes(window=2, chunk=2, weighs_size=True, scaling=0.7)


def _short_variates(*tensors: Tensor) -> Any:
    query, key, value, query_adapter, key_adapter = tensors
    return short_variates(query, key, value, query_adapter, key_adapter, "sum", SHORT)


def _short_pooled(*tensors: Tensor) -> Any:
    return short_pooled(tensors[0], tensors[1], tensors[2], tensors[3:], SHORT)


FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "attend": (_attend, "attend without visible"),
    "blocks": (_blocks, "blocks causal"),
    "causal": (_causal, "causal"),
    "window_chunks": (_window_chunks, "windows"),
    "short": (_short, "short, other tokens"),
    "short_variates": (_short_variates, "short chunks"),
    "short_pooled": (_short_pooled, "short chunks, learned"),
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
