"""The errors of a setting on hostile inputs, against float64, beside those of softmax and of the plain formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .inputs import INPUTS, Inputs, ordinary
from .settings import SHAPE, Setting

SCALES = (1e1, 1e2, 1e3, 1e4, 1e5)
HALF_SCALES = (1e1, 1e3, 1e5)
BOUNDED = 1e3  # beyond it results only have to be finite
SMALLEST = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("output", "gradients")

Results = tuple[Tensor, ...]


def differentiated(function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> Results:
    """The output and the gradients of query, key and value, in `dtype`."""
    leaves = [z.detach().to(dtype).requires_grad_() for z in inputs]
    output = function(*leaves)
    weight = torch.randn(
        *output.shape, generator=torch.Generator().manual_seed(1)
    ).bfloat16()  # the same in all dtypes
    return (output.detach(), *torch.autograd.grad(output, leaves, weight.to(dtype)))


def errors(found: Results, exact: Results) -> tuple[float, float]:
    """The largest absolute error of the output, and of the three gradients; infinite for what is not finite."""
    off = [float((a.double() - b).abs().nan_to_num(nan=torch.inf).amax()) for a, b in zip(found, exact, strict=True)]
    return off[0], max(off[1:])


def measure(setting: Setting, name: str, scale: float, dtype: str) -> dict[str, Any] | None:
    """Errors of one case and their bounds, in a form for JSON; `None` if `dtype` cannot hold the inputs or results."""
    kind = DTYPES[dtype]
    inputs: Inputs = tuple(z.to(kind) for z in INPUTS[name](ordinary(SHAPE), scale))  # type: ignore[assignment]
    if not all(bool(z.isfinite().all()) for z in inputs):
        return None
    exact = differentiated(setting.call, inputs, torch.float64)
    assert all(bool(z.isfinite().all()) for z in exact), (setting.name, name, scale)
    if any(float(z.abs().max()) > torch.finfo(kind).max for z in exact):
        return None
    ours = errors(differentiated(setting.call, inputs, kind), exact)
    case = {"setting": setting.name, "input": name, "scale": scale, "dtype": dtype, "ours": ours}
    if scale > BOUNDED:
        return {**case, "kept": max(ours) < float("inf")}
    limits = [SMALLEST * max(1.0, float(inputs[2].double().std()))] * 2  # of values of order 1
    for reference, factor in (("softmax", 10), ("plain", 2)):
        if any(off > limit for off, limit in zip(ours, limits, strict=True)):
            case[reference] = (
                _softmax(setting, inputs, kind) if reference == "softmax" else _plain(setting, inputs, exact)
            )
            limits = [max(limit, factor * off) for limit, off in zip(limits, case[reference], strict=True)]
    case["kept"] = all(off <= limit for off, limit in zip(ours, limits, strict=True))
    return case


def _softmax(setting: Setting, inputs: Inputs, dtype: torch.dtype) -> tuple[float, float]:
    return errors(
        differentiated(setting.softmax, inputs, dtype), differentiated(setting.softmax, inputs, torch.float64)
    )


def _plain(setting: Setting, inputs: Inputs, exact: Results) -> tuple[float, float]:
    """In float32, rounded to the dtype of the inputs."""
    found = differentiated(setting.formula, inputs, torch.float32)
    return errors(tuple(z.to(inputs[0].dtype) for z in found), exact)


def cases(
    settings: list[Setting], dtypes: list[str], scales: tuple[float, ...] | None = None
) -> Iterator[dict[str, Any]]:
    """All combinations that a dtype can hold."""
    for setting in settings:
        for dtype in dtypes:
            for name in INPUTS:
                for scale in scales or (SCALES if dtype == "float32" else HALF_SCALES):
                    found = measure(setting, name, scale, dtype)
                    if found is not None:
                        yield found
