"""Every operator of torch, with arguments to call it and its backward operator with."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_linattn import kernels
from hf_linattn.kernels.decode import decode_step
from hf_linattn.kernels.half_norm import half_norm
from hf_linattn.kernels.short_chunks import short_pooled
from hf_linattn.kernels.short_chunks.cutting import Sizes
from hf_linattn.kernels.short_slots import short_slot_attention

# Attention functions define an operator when they are first called; here all are wanted, whatever ran before.
for package in pkgutil.iter_modules(kernels.__path__):
    if package.ispkg and importlib.util.find_spec(f"hf_linattn.kernels.{package.name}.operator"):
        importlib.import_module(f"hf_linattn.kernels.{package.name}.operator")
OPERATORS = torch.ops.hf_linattn
INF = float("inf")


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


def short_case(
    tokens: int, dtype: torch.dtype, *, others: bool = False, own: bool = False, bare: bool = False
) -> tuple[Any, ...]:
    """Rows of five tokens in windows of two, as many as `tokens`; `bare` without any bias."""
    assert short_slot_attention  # its operator is defined where it is imported
    shape, rows = (tokens, 5, 2), tokens if own else 1
    bias = random(*shape, seed=6, dtype=wide(dtype))
    bias[0, 0] = -INF
    return (
        *(random(*shape, dim, seed=i, dtype=dtype) for i, dim in enumerate((4, 4, 3))),
        *(random(*shape, 4, seed=i, dtype=dtype) if others else None for i in (3, 4)),
        None if bare else random(*shape, seed=5, dtype=wide(dtype)),
        None if bare else bias,
        random(rows, 2, 6, 4, seed=7, dtype=dtype),
        None if bare else random(rows, 2, 6, seed=8, dtype=wide(dtype)),
        random(rows, 2, 6, 4, seed=9, dtype=dtype),
        None if bare else random(rows, 2, 6, seed=10, dtype=wide(dtype)),
        *(2, [], 0.7, 1.0, 0.5, -1.3, bare, not bare, True, []),
        "torch",
    )


def short_chunks_case(
    tokens: int,
    dtype: torch.dtype,
    *,
    learned: bool = False,
    window: int = 2,
    chunk: int = 2,
    backend: str = "torch",
    **others: Any,
) -> tuple[Any, ...]:
    """Windows of which the last is not whole. others: Of `Sizes`."""
    assert short_pooled  # its operator is defined where it is imported
    count = others["height"] * others["width"] + 1 if others.get("height") else 2 * tokens - 1
    # Tokens come before heads in memory.
    given = [random(2, count, 3, 4, seed=i, dtype=dtype).transpose(1, 2) for i in range(3)]
    square, row = (3, 4, 4), (3, 4)
    shapes = [row, row, square, square, (3,), row, row] if learned else [square, square]
    maps = [random(*shape, seed=3 + i, dtype=dtype) / 2 for i, shape in enumerate(shapes)]
    sizes = [list(z) if isinstance(z, tuple) else z for z in Sizes(window, chunk, True, 0.7, **others)]
    return (*given, *maps, *(() if learned else ("sum",)), *sizes, backend)


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
    "short": ("short", short_case),
    "short, other tokens": ("short", lambda n, d: short_case(n, d, others=True)),
    "short, own slots": ("short", lambda n, d: short_case(n, d, own=True)),
    "short, bare": ("short", lambda n, d: short_case(n, d, bare=True)),
    "short chunks": ("short_variates", short_chunks_case),
    "short chunks, longer": ("short_variates", lambda n, d: short_chunks_case(4 * n, d, chunk=4)),
    "short chunks, learned": ("short_pooled", lambda n, d: short_chunks_case(n, d, learned=True)),
    "short chunks, learned, longer": ("short_pooled", lambda n, d: short_chunks_case(4 * n, d, learned=True, chunk=4)),
    "short chunks, image": ("short_variates", lambda n, d: short_chunks_case(n, d, height=3, width=5, num_global=1)),
    "short chunks, learned, image": (
        "short_pooled",
        lambda n, d: short_chunks_case(n, d, learned=True, height=3, width=4, num_global=1),
    ),
    "short chunks, lengths": ("short_variates", lambda n, d: short_chunks_case(4, d, lengths=(7, 4), chunks=(2, 1))),
    "short chunks, in C": ("short_variates", lambda n, d: short_chunks_case(4 * n, d, window=4, backend="auto")),
    "short chunks, learned, in C": (
        "short_pooled",
        lambda n, d: short_chunks_case(4 * n, d, learned=True, window=4, backend="auto"),
    ),
    "decode": ("decode_step", decode_case),
    "half_norm": ("half_norm", half_norm_case),
}
# Of the differentiable ones: how many inputs have gradients, in the order of the backward operator's results.
GRADIENTS = {
    "attend": (0, 1, 2, 3),
    "blocks": tuple(range(8)),
    "causal": tuple(range(8)),
    "window_chunks": (0, 1, 2, 4, 5, 6),
    "short": tuple(range(11)),
    "short_variates": tuple(range(5)),
    "short_pooled": tuple(range(10)),
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
