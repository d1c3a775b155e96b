"""What many tests share: random tensors, masks, comparison in float64, and changing a saved checkpoint by hand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

TOKENS = 23

# Two rows of `TOKENS` tokens, padded in every way that matters; True where a token is real.
MASKS: dict[str, Tensor | None] = {
    "none": None,
    "right": torch.tensor([[1] * 23, [1] * 15 + [0] * 8]).bool(),
    "left": torch.tensor([[0] * 19 + [1] * 4, [1] * 23]).bool(),
    "holes": torch.tensor([[1, 0, 1] * 7 + [1, 1], [0, 0] + [1] * 10 + [0] * 11]).bool(),
    "all": torch.tensor([[0] * 23, [1] * 23]).bool(),  # one row is nothing but padding
    "one": torch.tensor([[0] * 22 + [1], [1] * 23]).bool(),
}


def examples(count: int) -> int:
    """Of `count` examples of Hypothesis those of this run: all with its profile "thorough", a third by default."""
    return max(4, count * settings.default.max_examples // 100)


def random(
    *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Tensor:
    """Normal numbers that depend on the seed alone, drawn in `dtype`."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale).to(device)


def inputs(tokens: int = TOKENS, dim: int = 4, batch: int = 2, heads: int = 2, scale: float = 1.2) -> list[Tensor]:
    """Query, key and value `[batch, heads, tokens, dim]` in float64."""
    return [random(batch, heads, tokens, dim, seed=3 * (tokens + dim) + i, scale=scale) for i in range(3)]


def assert_same(ours: Tensor, expected: Tensor, atol: float = 1e-11) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


def patch_with_spy(patch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Let a function keep the first argument of every call. Returns: the list of them."""
    module, _, function = name.rpartition(".")
    original, seen = getattr(importlib.import_module(module), function), []

    def spy(first: Any, *args: Any, **options: Any) -> Any:
        seen.append(first)
        return original(first, *args, **options)

    patch.setattr(name, spy)
    return seen


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; `None` removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            values.pop(name, None)
        else:
            values[name] = value
    path.write_text(json.dumps(values))
