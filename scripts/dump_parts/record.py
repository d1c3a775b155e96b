"""`Record`: named tensors and texts of one run, written to and read from a safetensors file."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Record:
    """Results by name, `group/case/what`. Errors are results too: their class and message are kept as a text.

    Args:
        only: Cases whose `group/case` does not match this pattern are left out.
    """

    def __init__(self, only: str = "") -> None:
        self.tensors: dict[str, Tensor] = {}
        self.texts: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._only = re.compile(only)

    def case(self, group: str, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run one case with fixed seeds and keep what it returns: tensors, or anything else as a text."""
        if not self._only.search(f"{group}/{name}"):
            return
        torch.manual_seed(seed_of(f"{group}/{name}"))
        start = time.perf_counter()
        try:
            results = run()
        except Exception as error:
            results = {"raises": f"{type(error).__name__}: {error}"}
        self.seconds[group] = self.seconds.get(group, 0.0) + time.perf_counter() - start
        for what, value in results.items():
            key = f"{group}/{name}/{what}"
            if key in self.tensors or key in self.texts:
                raise ValueError(f"Two results are called {key!r}.")
            if isinstance(value, Tensor):
                self.tensors[key] = value.detach().clone().contiguous()
            else:
                self.texts[key] = str(value)

    def keep(self, only: str) -> None:
        """Drop what does not match a pattern."""
        for results in (self.tensors, self.texts):
            for name in [name for name in results if not re.search(only, name.rpartition("/")[0])]:
                del results[name]  # type: ignore[attr-defined]

    def save(self, path: Path) -> None:
        """Write everything to a safetensors file, the texts as its metadata."""
        save_file(self.tensors, path, metadata=self.texts)


def read_record(path: Path) -> Record:
    """What `Record.save` wrote."""
    record = Record()
    with safe_open(path, "pt") as file:
        record.texts = dict(file.metadata() or {})
        record.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return record


def seed_of(name: str) -> int:
    """A seed that depends on the name alone."""
    return zlib.crc32(name.encode())


def random(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that depend on the name and the shape alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed_of(name)), dtype=torch.float64).to(dtype)
