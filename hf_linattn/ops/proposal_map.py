"""The learned map of a proposal, as the attention functions of LARA and EVA take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Learned map of the mean query or key of a landmark or chunk: `[..., head_dim]` to the same shape.
ProposalMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ResidualMap:
    """`z + z A`, with `A` `[heads, head_dim, head_dim]`."""

    adapter: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        return z + z @ self.adapter.to(z.dtype)
