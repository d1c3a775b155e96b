"""The window of a sequence that is still growing: the tokens that a next query sees exactly.

A row counts its real tokens alone, so rows that were padded differently are at different places of their windows. How
many tokens a row has here is known to Python where possible, because then nothing has to be computed "in case a window
is full"; with static shapes (a compiled step) it is a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..padding import real_tokens_first, reorder_tokens
from ..softmax import mask_logits
from .pending import PendingTokens

Counts = tuple[int, ...] | Tensor
Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class WindowShape:
    """`size` tokens per block, 0 for none; `overlap`: a query also sees the whole block before its own."""

    size: int
    overlap: bool = False

    @property
    def places(self) -> int:
        """Tokens that a window may hold: as soon as there are so many, the first block has passed."""
        return self.size * (2 if self.overlap else 1)

    def passed(self, count: Count) -> Count:
        """How many of `count` tokens, the first of which begins a block, no later query sees exactly."""
        if not self.size:
            return count
        blocks = count // self.size
        return (blocks - int(self.overlap)) * (blocks > 0) * self.size


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
        query: Like `key`, where the summary of a block needs queries; else `None`.
        key, value: `[batch, heads, places, head_dim]` as they came (not scaled), a row's tokens first, without
            padding. What stands behind them is finite and means nothing.
        counts: Tokens of every row. A tensor `[batch]` stands for static shapes: then there are always as many places
            as the window may need.
    """

    query: Tensor | None
    key: Tensor
    value: Tensor
    counts: Counts

    @staticmethod
    def empty(
        key: Tensor, value: Tensor, *, with_queries: bool = False, static_places: int | None = None
    ) -> WindowTokens:
        """No tokens, for rows like those of `key` and `value`; `static_places` asks for static shapes."""

        def room(like: Tensor) -> Tensor:
            return like.new_zeros(*like.shape[:2], static_places or 0, like.shape[-1])

        counts: Counts = (0,) * key.shape[0]
        if static_places is not None:
            counts = torch.zeros(key.shape[0], dtype=torch.long, device=key.device)
        return WindowTokens(room(key) if with_queries else None, room(key), room(value), counts)

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
        self, query: Tensor | None, key: Tensor, value: Tensor, key_mask: Tensor | None, shape: WindowShape
    ) -> tuple[EvictedTokens, WindowTokens]:
        """Take in new tokens (of all rows the same number of places, with padding anywhere).

        Returns: what has left the window, and the window now.
        """
        joined = self.join(query if self.query is not None else None, key, value, key_mask)
        batch, tokens = joined.key.shape[0], joined.tokens
        if joined.mask is None and self.even is not None:
            gone = shape.passed(tokens)
            # Copied: a view would keep all tokens alive.
            kept = each_of(joined, lambda z: z[:, :, gone:].clone())
            return (
                EvictedTokens(*each_of(joined, lambda z: z[:, :, :gone]), None),
                WindowTokens(*kept, (tokens - gone,) * batch),
            )
        mask = key.new_ones(batch, tokens, dtype=torch.bool) if joined.mask is None else joined.mask
        order, real = real_tokens_first(mask)
        rows = PendingTokens(*each_of(joined, lambda z: reorder_tokens(z, order, real)), real)
        lengths = mask.sum(-1)
        passed = shape.passed(lengths)
        counts: Counts = lengths - passed
        most, places = tokens, self.key.shape[2]
        if not isinstance(self.counts, Tensor):
            counts = tuple((lengths - passed).tolist())
            most, places = int(passed.max()), max(counts)
        return (
            EvictedTokens(*each_of(rows, lambda z: z[:, :, :most]), passed),
            WindowTokens(*each_of(rows, lambda z: take_tokens(z, passed, places)), counts),
        )

    # -- one token --------------------------------------------------------------------------------------------------
    def append(self, query: Tensor | None, key: Tensor, value: Tensor, valid: Tensor | None = None) -> WindowTokens:
        """Take in one token per row, `[batch, heads, 1, head_dim]`, none of which leaves the window yet.

        Args:
            valid: `[batch]`, False for a row whose token is padding; static shapes only.
        """
        counts, places = self.counts, self.key.shape[2]
        is_full = self.even == places
        if isinstance(counts, Tensor):
            counts = counts + (1 if valid is None else valid.to(counts.dtype))
        else:
            counts = tuple(c + 1 for c in counts)
            places = max(counts)
        here = None
        if not is_full:
            here = torch.arange(places, device=key.device) == self.count()[:, None]
            here = (here if valid is None else here & valid[:, None])[:, None, :, None]

        def write(own: Tensor, new: Tensor) -> Tensor:
            if here is None:
                return torch.cat([own, new.to(own.dtype)], dim=2)
            room = F.pad(own, (0, 0, 0, places - own.shape[2])) if places > own.shape[2] else own[:, :, :places]
            return torch.where(here, new.to(own.dtype), room)

        queries = None if self.query is None or query is None else write(self.query, query)
        return WindowTokens(queries, write(self.key, key), write(self.value, value), counts)

    def logits(self, query: Tensor) -> Tensor:
        """Of one scaled query per row, `[batch, heads, 1, head_dim]`; `-inf` where there is no token."""
        mask = self.mask()
        logits = query @ self.key.to(query.dtype).transpose(-1, -2)
        return mask_logits(logits, None if mask is None else mask[:, None, None])

    def full(self, shape: WindowShape) -> list[int] | None:
        """Rows whose first block has passed, as Python knows them; `None` with static shapes."""
        if isinstance(self.counts, Tensor):
            return None
        return [row for row, count in enumerate(self.counts) if count == shape.places]

    def drop(self, shape: WindowShape) -> WindowTokens:
        """Without the first block, in rows where it has passed."""
        size, counts, places = shape.size, self.counts, self.key.shape[2]
        if self.even == shape.places:
            return WindowTokens(*each_of(self, lambda z: z[:, :, size:].clone()), (places - size,) * len(counts))
        gone = (self.count() == shape.places).long() * size
        if isinstance(counts, Tensor):
            counts = counts - gone
        else:
            counts = tuple(c - size if c == shape.places else c for c in counts)
            places = max(counts)
        return WindowTokens(*each_of(self, lambda z: take_tokens(z, gone, places)), counts)

    # -- rows -------------------------------------------------------------------------------------------------------
    def rows(self, index: Tensor) -> WindowTokens:
        """Pick rows, as beam search does."""
        return WindowTokens(*each_of(self, lambda z: z.index_select(0, index)), select_counts(self.counts, index))


def select_counts(counts: Counts, index: Tensor) -> Counts:
    """The counts of the rows `index`."""
    if isinstance(counts, Tensor):
        return counts.index_select(0, index)
    if len(set(counts)) < 2:  # nothing to read from the device
        return counts[:1] * index.shape[0]
    return tuple(counts[row] for row in index.tolist())


def take_tokens(z: Tensor, start: Tensor, places: int) -> Tensor:
    """`places` tokens of `z` `[batch, heads, tokens, dim]` from `start` `[batch]` on; past the end the last ones."""
    if not z.shape[2]:
        return z.new_zeros(*z.shape[:2], places, z.shape[-1])
    index = (start[:, None] + torch.arange(places, device=z.device)).clamp_max(z.shape[2] - 1)
    return z.gather(2, index[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[-1]))


def each_of(tokens: Any, fn: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, Tensor, Tensor]:
    """`fn` of queries (if there are any), keys and values."""
    return None if tokens.query is None else fn(tokens.query), fn(tokens.key), fn(tokens.value)


def may_look(tensor: Tensor) -> bool:
    """Whether reading a value costs nothing: on the CPU, and not while compiling."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
