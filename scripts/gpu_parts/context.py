"""What every part is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Context:
    """How to run.

    Args:
        is_rehearsal: On a CPU with small sizes, kernels in Triton's interpreter: shows that parts run, nothing else.
        model: A folder with a checkpoint and its tokenizer, for the recipe.
    """

    is_rehearsal: bool = False
    model: Path | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.is_rehearsal else "cuda"

    def synchronize(self) -> None:
        if not self.is_rehearsal:
            torch.cuda.synchronize()
