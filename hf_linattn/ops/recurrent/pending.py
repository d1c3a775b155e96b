"""Tokens that are kept one by one, and which tokens were real: what a memory needs beside a kind's state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PendingTokens:
    """Tokens that have not been absorbed, padding included; `query` only where the kind's state needs it."""

    query: Tensor | None
    key: Tensor
    value: Tensor
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    def cut(self, start: int, stop: int) -> PendingTokens:
        query = None if self.query is None else self.query[:, :, start:stop]
        mask = None if self.mask is None else self.mask[:, start:stop]
        return PendingTokens(query, self.key[:, :, start:stop], self.value[:, :, start:stop], mask)

    def requires_grad(self) -> bool:
        return any(z.requires_grad for z in (self.query, self.key, self.value) if z is not None)

    def then(self, new: PendingTokens) -> PendingTokens:
        mask = None
        if self.mask is not None or new.mask is not None:
            parts = [
                p.key.new_ones(p.key.shape[0], p.tokens, dtype=torch.bool) if p.mask is None else p.mask
                for p in (self, new)
            ]
            mask = torch.cat(parts, dim=1)
        query = None if self.query is None or new.query is None else torch.cat([self.query, new.query], dim=2)
        return PendingTokens(query, torch.cat([self.key, new.key], 2), torch.cat([self.value, new.value], 2), mask)


def fingerprint(mask: Tensor, start: int = 0) -> tuple[int, ...]:
    """A number per row that tells masks `[batch, tokens]` apart; of tokens from `start` on. Those of parts add up."""
    place = torch.arange(start + 1, start + 1 + mask.shape[1], device=mask.device)
    mixed = place * -7046029254386353131  # odd constants with bits all over, as in splitmix64
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return tuple((mask * (mixed ^ (mixed >> 32))).sum(-1).tolist())


def added(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """Row by row, wrapping around like the sums of a tensor."""
    return tuple((a + b + 2**63) % 2**64 - 2**63 for a, b in zip(first, second, strict=True))
