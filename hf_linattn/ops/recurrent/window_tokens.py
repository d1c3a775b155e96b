"""The tokens near the end of a sequence that is still growing: those that a next query sees exactly.

A row counts its real tokens alone, so rows that were padded differently are at different places of their windows. How
many tokens a row has here is known to Python where possible, because then nothing has to be computed "in case a window
is full"; with static shapes (a compiled step) it is a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..padding import real_tokens_first, reorder_tokens
from .pending import PendingTokens

Counts = tuple[int, ...] | Tensor


@dataclass(frozen=True)
class Window:
    """`size` tokens per block, 0 for none; `overlap`: a query also sees the whole block before its own."""

    size: int
    overlap: bool = False

    @property
    def places(self) -> int:
        """Tokens that may be near: as soon as there are so many, the first block has passed."""
        return self.size * (2 if self.overlap else 1)

    def passed(self, count: int) -> int:
        """How many of `count` tokens, the first of which begins a block, no later query sees exactly."""
        if not self.size:
            return count
        return max(0, count // self.size - (1 if self.overlap else 0)) * self.size

    def passed_each(self, count: Tensor) -> Tensor:
        """The same, row by row."""
        if not self.size:
            return count
        return (count // self.size - (1 if self.overlap else 0)).clamp_min(0) * self.size


class EvictedTokens(NamedTuple):
    """Tokens that have left the window, each row's first: `[batch, heads, tokens, head_dim]`.

    `filled` is how many of them a row has, `[batch]`; `None` if all rows have as many as there are.
    """

    query: Tensor | None
    key: Tensor
    value: Tensor
    filled: Tensor | None

    @property
    def mask(self) -> Tensor | None:
        """`[batch, tokens]`, True where there is a token; `None` if everywhere."""
        if self.filled is None:
            return None
        return torch.arange(self.key.shape[2], device=self.key.device) < self.filled[:, None]


@dataclass(frozen=True)
class WindowTokens:
    """Each row's latest tokens, as many as have not left the window; the first of them begins a block.

    Args:
        key, value: `[batch, heads, places, head_dim]` as they came (not scaled), a row's tokens first, without
            padding. What stands behind them is finite and means nothing.
        query: The same, where the summary of a block needs them; else `None`.
        counts: Tokens of every row. A tensor `[batch]` stands for static shapes: then there are always as many places
            as the window may need.
    """

    key: Tensor
    value: Tensor
    query: Tensor | None
    counts: Counts

    @staticmethod
    def empty(
        key: Tensor, value: Tensor, *, with_queries: bool = False, static_places: int | None = None
    ) -> WindowTokens:
        """No tokens, for rows like those of `key` and `value`; `static_places` asks for static shapes."""
        batch = key.shape[0]
        places = static_places or 0

        def room(like: Tensor) -> Tensor:
            return like.new_zeros(*like.shape[:2], places, like.shape[-1])

        counts: Counts = (0,) * batch
        if static_places is not None:
            counts = torch.zeros(batch, dtype=torch.long, device=key.device)
        return WindowTokens(room(key), room(value), room(key) if with_queries else None, counts)

    @property
    def is_static(self) -> bool:
        return isinstance(self.counts, Tensor)

    @property
    def even(self) -> int | None:
        """How many tokens every row has, if Python knows that all have the same."""
        if isinstance(self.counts, Tensor) or any(count != self.counts[0] for count in self.counts):
            return None
        return self.counts[0]

    def count(self) -> Tensor:
        """`[batch]`."""
        if isinstance(self.counts, Tensor):
            return self.counts
        return torch.tensor(self.counts, device=self.key.device)

    def mask(self) -> Tensor | None:
        """`[batch, places]`, True where there is a token; `None` if everywhere."""
        if self.even == self.key.shape[2]:
            return None
        return torch.arange(self.key.shape[2], device=self.key.device) < self.count()[:, None]

    # -- many tokens ------------------------------------------------------------------------------------------------
    def join(self, query: Tensor | None, key: Tensor, value: Tensor, key_mask: Tensor | None) -> PendingTokens:
        """These tokens and new ones behind them; queries where both have them."""
        new = PendingTokens(query, key, value, key_mask)
        if not self.key.shape[2]:
            return new
        return PendingTokens(self.query, self.key, self.value, self.mask()).then(new)

    def move_on(
        self, query: Tensor | None, key: Tensor, value: Tensor, key_mask: Tensor | None, window: Window
    ) -> tuple[EvictedTokens, WindowTokens]:
        """Take in new tokens (of all rows the same number of places, with padding anywhere).

        Returns: what has left the window, and what is near now.
        """
        joined = self.join(query if self.query is not None else None, key, value, key_mask)
        inputs = (joined.query, joined.key, joined.value)
        if joined.mask is None and self.even is not None:
            tokens = joined.key.shape[2]
            gone = window.passed(tokens)
            passed = EvictedTokens(*_each(inputs, lambda z: z[:, :, :gone]), None)
            # Copied: a view would keep all tokens alive.
            near = self._of(
                _each(inputs, lambda z: z[:, :, gone:].clone()),
                (tokens - gone,) * key.shape[0],
            )
            return passed, near
        mask = joined.mask
        if mask is None:
            mask = key.new_ones(joined.key.shape[0], joined.key.shape[2], dtype=torch.bool)
        order, real = real_tokens_first(mask)
        rows = _each(inputs, lambda z: reorder_tokens(z, order, real))
        lengths = mask.sum(-1)
        left_behind = window.passed_each(lengths)
        if self.is_static:
            most, places = joined.key.shape[2], self.key.shape[2]
            counts: Counts = lengths - left_behind
        else:
            counts = tuple((lengths - left_behind).tolist())
            most, places = int(left_behind.max()), max(counts)
        passed = EvictedTokens(*_each(rows, lambda z: z[:, :, :most]), left_behind)
        return passed, self._of(_each(rows, lambda z: _take(z, left_behind, places)), counts)

    # -- one token --------------------------------------------------------------------------------------------------
    def append(self, query: Tensor | None, key: Tensor, value: Tensor, valid: Tensor | None = None) -> WindowTokens:
        """Take in one token per row, `[batch, heads, 1, head_dim]`, none of which leaves the window yet.

        Args:
            valid: `[batch]`, False for a row whose token is padding; static shapes only.
        """
        even, places, counts = self.even, self.key.shape[2], self.counts
        if even is not None and even == places:
            grown = (
                torch.cat([self.key, key.to(self.key.dtype)], dim=2),
                torch.cat([self.value, value.to(self.value)], 2),
            )
            queries = None
            if self.query is not None and query is not None:
                queries = torch.cat([self.query, query.to(self.query.dtype)], dim=2)
            return WindowTokens(*grown, queries, (even + 1,) * key.shape[0])
        count = self.count()
        if isinstance(counts, Tensor):
            counts = counts + (1 if valid is None else valid.to(counts.dtype))
        else:
            counts = tuple(c + 1 for c in counts)
            places = max(counts)
        here = torch.arange(places, device=key.device) == count[:, None]
        if valid is not None:
            here = here & valid[:, None]
        here = here[:, None, :, None]

        def write(own: Tensor, new: Tensor) -> Tensor:
            room = F.pad(own, (0, 0, 0, places - own.shape[2])) if places > own.shape[2] else own[:, :, :places]
            return torch.where(here, new.to(own.dtype), room)

        queries = None if self.query is None or query is None else write(self.query, query)
        return WindowTokens(write(self.key, key), write(self.value, value), queries, counts)

    def full(self, window: Window) -> list[int] | None:
        """Rows whose first block has passed, as Python knows them; `None` with static shapes."""
        if isinstance(self.counts, Tensor):
            return None
        return [row for row, count in enumerate(self.counts) if count == window.places]

    def drop(self, window: Window, rows: list[int] | None) -> WindowTokens:
        """Without the first block, in rows where it has passed (`rows`, or with static shapes where it is full)."""
        size, counts = window.size, self.counts
        if not isinstance(counts, Tensor) and rows is not None and len(rows) == len(counts):
            return self._of(_each(self._tensors(), lambda z: z[:, :, size:].clone()), tuple(c - size for c in counts))
        gone = (self.count() == window.places).long() * size
        places = self.key.shape[2]
        if isinstance(counts, Tensor):
            counts = counts - gone
        else:
            counts = tuple(c - size if c == window.places else c for c in counts)
            places = max(counts)
        return self._of(_each(self._tensors(), lambda z: _take(z, gone, places)), counts)

    # -- rows -------------------------------------------------------------------------------------------------------
    def rows(self, index: Tensor) -> WindowTokens:
        """Pick rows, as beam search does."""
        if isinstance(self.counts, Tensor):
            counts: Counts = self.counts.index_select(0, index)
        elif self.even is not None:
            counts = (self.even,) * index.shape[0]
        else:
            counts = tuple(self.counts[row] for row in index.tolist())
        return self._of(_each(self._tensors(), lambda z: z.index_select(0, index)), counts)

    def _tensors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        return self.query, self.key, self.value

    @staticmethod
    def _of(tensors: tuple[Tensor | None, Tensor, Tensor], counts: Counts) -> WindowTokens:
        query, key, value = tensors
        return WindowTokens(key, value, query, counts)


def _take(z: Tensor, start: Tensor, places: int) -> Tensor:
    """`places` tokens of `z` `[batch, heads, tokens, dim]` from `start` `[batch]` on; past the end the last ones."""
    if not z.shape[2]:
        return z.new_zeros(*z.shape[:2], places, z.shape[-1])
    index = (start[:, None] + torch.arange(places, device=z.device)).clamp_max(z.shape[2] - 1)
    return z.gather(2, index[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[-1]))


def _each(tensors: Any, fn: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, Tensor, Tensor]:
    """`fn` of query (if there is one), key and value, which come first in `tensors`."""
    query, key, value = tensors[:3]
    return None if query is None else fn(query), fn(key), fn(value)
