"""Kernels as operators of torch: opaque to `torch.compile` and `torch.export`, and usable under `torch.func`.

The library calls a `torch.autograd.Function` around a forward and a backward operator: in that order
`torch.func.grad` and `vmap` work. The forward operator has the same derivative when it is called by itself, as an
exported program does. Derivatives in forward mode and second derivatives raise: torch takes whatever has none for a
constant, and would answer 0.

Where nothing looks at a call (`is_plain`) the kernels are called without their operators: finding the way through
torch's dispatcher into Python, twice, takes longer than a short input.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .attention_state import AttentionState
from .backends import runs_on_triton

_LIBRARY = torch.library.Library("hf_linattn", "DEF")


def register_pair(
    schema: str,
    kernels: ModuleType,
    *,
    compiled: ModuleType | None = None,
    record: type | None = None,
    kept: Callable[..., tuple[Tensor, ...]] | None = None,
    differentiable: Sequence[int] | None = None,
    heads_first: int = 0,
    takes_no_grad_lse: bool = False,
) -> Callable[..., tuple[Tensor, ...]]:
    """Define the operators `hf_linattn::<name>` and `hf_linattn::<name>_backward` of a softmax and its derivative.

    Args:
        schema: `name(tensors, options) -> results` of the forward pass, without the backend. The first two results
            are an output and its log-sum-exp; others are kept for the backward pass. Queries come first, one tensor
            is the `value`, and all start with a batch dimension.
        kernels: The module `torch_kernel` of the operation; `triton_launch` beside it is imported when it is needed.
            Each has `<name>_forward(*tensors, *options)`, and `<name>_backward(grad_output, grad_lse, *tensors,
            *results, needs, *options)`, which returns the gradients that `needs` asks for, and None for the others.
        compiled: A module with the same functions for tensors on a CPU, unless the backend is "torch".
        record: A NamedTuple of the tensors. With one the functions are `<name>_forward(inputs, *options)` and
            `<name>_backward(grads, inputs, results, needs, *options)`.
        kept: Empty tensors like the results after the log-sum-exp, from the arguments of the operator.
        differentiable: Which tensors have gradients, if not all.
        heads_first: So many tensors, the first, and the results are `[batch, heads, tokens(, dim)]`; gradients and
            results have the heads of a token next to each other in memory.
        takes_no_grad_lse: Whether the backward kernel takes `None` for the gradient of a log-sum-exp that has none.
    Returns: the function of tensors, options and the name of a backend.
    """
    name, rest = schema.split("(", 1)
    arguments, results = (part.strip("()").split(", ") for part in rest.split(" -> "))
    tensors = [argument for argument in arguments if argument.startswith("Tensor")]
    options = [*arguments[len(tensors) :], "str backend"]
    count, value_place = len(tensors), tensors.index("Tensor value")
    places = tuple(range(count)) if differentiable is None else tuple(differentiable)
    inputs = [] if record is None else [(record._make, count)]  # type: ignore[attr-defined]
    backward_inputs = [(AttentionState._make, 2), *inputs, (tuple, len(results))] if inputs else []
    compute_gradients = dispatch(kernels, f"{name}_backward", compiled=compiled, records=backward_inputs, like=2)

    def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
        query, value = arguments[0], arguments[value_place]
        output = _empty(value, (*query.shape[:-1], value.shape[-1]), heads_first > 0)
        lse = _empty(query, query.shape[:-1], heads_first > 0).to(torch.promote_types(query.dtype, torch.float32))
        return output, lse, *(() if kept is None else kept(*arguments))

    def backward_kernel(*arguments: Any) -> list[Tensor]:  # an operator cannot return None
        return [grad for grad in compute_gradients(*arguments) if grad is not None]

    def backward_fake(*arguments: Any) -> list[Tensor]:
        given, needs = arguments[2 : 2 + count], arguments[2 + count + len(results)]
        wanted = [(given[place], place) for place, needed in zip(places, needs, strict=True) if needed]
        return [_empty(z, z.shape, place < heads_first) for z, place in wanted]

    compute = dispatch(kernels, f"{name}_forward", compiled=compiled, records=inputs)

    def in_their_places(ctx: Any, found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments, from those of the differentiable ones that need them."""
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        rest = iter(found)
        for place in places:
            if ctx.needs_input_grad[place]:
                result[place] = next(rest)
        return tuple(result)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:count], *output)
        ctx.mark_non_differentiable(*output[2:])
        ctx.options = inputs[count:]

    class Pair(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            return forward_operator(*arguments)

        setup_context = staticmethod(setup)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            needs = [ctx.needs_input_grad[place] for place in places]
            found = backward_of(backward_operator, *grads[:2], *ctx.saved_tensors, needs, *ctx.options)
            return in_their_places(ctx, found)

    class Plain(torch.autograd.Function):
        """`Pair` with the kernels themselves."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            results = tuple(compute(*arguments))
            setup(ctx, arguments, results)
            ctx.set_materialize_grads(False)  # of what is kept
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            is_unusual = torch.is_grad_enabled() or not is_plain(grads[:2])
            given: list[Tensor | None] = list(grads[:2])
            saved = ctx.saved_tensors  # once: checkpointing computes them again for each time
            for i, like in enumerate(saved[count : count + 2]):
                if given[i] is None and (is_unusual or not (i and takes_no_grad_lse)):
                    given[i] = torch.zeros_like(like)
            needs = [ctx.needs_input_grad[place] for place in places]
            if is_unusual:
                return in_their_places(ctx, backward_of(backward_operator, *given, *saved, needs, *ctx.options))
            return in_their_places(ctx, backward_kernel(*given, *saved, needs, *ctx.options))

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        given = arguments[:count]
        if not is_plain(given):
            return Pair.apply(*_each_once(given), *arguments[count:])
        if torch.is_grad_enabled() and any([z is not None and z.requires_grad for z in given]):
            if any([z is not None and z.is_inference() for z in given]):  # which no graph may keep
                given = tuple([z.clone() if z is not None and z.is_inference() else z for z in given])
            return Plain.apply(*given, *arguments[count:])
        return tuple(compute(*arguments))

    # `torch.compile` counts parameters to see whether the function takes a context.
    names = [argument.split()[1] for argument in (*tensors, *options)]
    parameters = [inspect.Parameter(each, inspect.Parameter.POSITIONAL_ONLY) for each in names]
    Pair.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    forward_operator = register(
        f"{name}({', '.join([*tensors, *options])}) -> ({', '.join(['Tensor'] * len(results))})",
        compute,
        forward_fake,
        Pair,
    )
    given = ["Tensor grad_output", "Tensor grad_lse", *tensors, *results, "bool[] needs", *options]
    backward_operator = register(f"{name}_backward({', '.join(given)}) -> Tensor[]", backward_kernel, backward_fake)
    return call


def _empty(like: Tensor, shape: Sequence[int], heads_first: bool) -> Tensor:
    """An empty tensor, contiguous or with tokens before heads in memory."""
    if not heads_first:
        return like.new_empty(shape)
    batch, heads, tokens, *dim = shape
    return like.new_empty(batch, tokens, heads, *dim).transpose(1, 2)


def _each_once(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same with a view in place of what was there before: `torch.compile` takes no tensor twice."""
    found: list[Tensor | None] = []
    for z in tensors:
        found.append(z.view_as(z) if z is not None and any(z is other for other in found) else z)
    return found


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call has ordinary tensors with contents, and no tracing, transform or mode wants to see operators."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    for z in tensors:
        if z is not None and (type(z) not in _ORDINARY or z.is_meta):
            return False
    return True


_ORDINARY = (Tensor, torch.nn.Parameter)


def dispatch(
    kernels: ModuleType,
    name: str,
    *,
    compiled: ModuleType | None = None,
    records: Sequence[tuple[Callable[[Any], Any], int]] = (),
    like: int = 0,
) -> Callable[..., Any]:
    """The kernel `name` of the module `kernels`, or that of `triton_launch` beside it: the last argument says which.

    Args:
        compiled: As in `register_pair`.
        records: What the first arguments are packed into, and how many go into each.
        like: Which argument decides, by its device and dtype, whether Triton can be used.
    """

    def run(*arguments: Any) -> Any:
        tensor, module = arguments[like], kernels
        device = tensor.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # also where a backward pass runs under it
                return run(*arguments)
        if runs_on_triton(arguments[-1], tensor):
            module = importlib.import_module(".triton_launch", kernels.__package__)
        elif compiled is not None and device == "cpu" and arguments[-1] != "torch":
            module = compiled
        packed, start = [], 0
        for make, count in records:
            packed.append(make(arguments[start : start + count]))
            start += count
        return getattr(module, name)(*packed, *arguments[start:-1])

    return run


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
) -> Any:
    """Define the operator `hf_linattn::<schema>`.

    Args:
        schema: Every tensor argument and result has a leading batch dimension, so that `vmap` is a longer batch.
        kernel: Computes it on real tensors. fake: Returns empty tensors of the right shape, dtype and (contiguous)
            layout.
        function: What has its derivative, a function of the same arguments. Without one a derivative raises
            UnsupportedError.
    Returns: the operator.
    """
    name = schema.split("(")[0]
    qualified = f"hf_linattn::{name}"
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    operator = getattr(torch.ops.hf_linattn, name).default

    def batched(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def fold(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        results = operator(*[fold(x, dim) for x, dim in zip(args, in_dims, strict=True)])
        found = [x.unflatten(0, (size, -1)) for x in results]
        zeros = [0] * len(found)
        return (found, zeros) if isinstance(results, list) else (tuple(found), tuple(zeros))

    torch.library.register_vmap(qualified, batched, lib=_LIBRARY)
    derivative = _Once if function is None else function
    torch.library.register_autograd(
        qualified, derivative.backward, setup_context=derivative.setup_context, lib=_LIBRARY
    )
    return operator


class _Once(torch.autograd.Function):
    """An operator without a derivative: its results depend on all of its inputs, and differentiating them raises.

    `once_differentiable` would not do: `torch.func.grad` of a gradient is 0 under it, and `torch.autograd.grad` leaves
    out what comes from the gradients that it marks.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(operator(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(
            "Attention through slots and windows has first derivatives only, and decoding steps have none; a"
            " derivative of one was asked for. Use differences of first derivatives, or attn_implementation='eager'."
        )


def backward_of(operator: Any, *arguments: Any) -> list[Tensor]:
    """What a backward operator returns; differentiating it again raises UnsupportedError."""
    if torch.compiler.is_compiling():  # no functions within functions there, but the operator's own derivative raises
        return list(operator(*arguments))
    return list(_Once.apply(operator, *arguments))
