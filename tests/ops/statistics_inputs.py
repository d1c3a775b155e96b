"""Correlated queries and keys, and the variants of FAVOR#, for tests of statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_linattn.ops.favor.statistics import FAVOR_VARIANTS

HEADS, DIM = 2, 4
every_variant = pytest.mark.parametrize("variant", FAVOR_VARIANTS)
centred_or_not = pytest.mark.parametrize("centring", [False, True])
MASK = torch.tensor([[1, 0, 1] * 7 + [1, 1], [0, 0] + [1] * 14 + [0] * 7]).bool()


def inputs(tokens: int = 23, dim: int = DIM, seed: int = 0, batch: int = 2) -> list[Tensor]:
    """Queries and keys with different, correlated, off-centre distributions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [normal(batch, HEADS, tokens, dim) @ normal(HEADS, dim, dim) + normal(HEADS, 1, dim) for _ in range(2)]
