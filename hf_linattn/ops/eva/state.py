"""What causal EVA keeps of the tokens it has seen: chunk summaries, and the tokens of the window.

`EvaRecurrence` (`recurrent.py`) takes tokens in: `step` one of every row, `absorb` any number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import InputError
from ..precision import compute_dtype
from ..recurrent.window_tokens import Counts, WindowTokens, may_look, select_counts, take_tokens
from .bounded import EarlierChunks, merge_all
from .chunks import Summaries


@dataclass(frozen=True)
class EvaState:
    """What is kept of the tokens seen so far.

    Args:
        window: The tokens of the window, with their queries where proposals are made of them.
        chunks: Mean keys (scaled), values, log-weights and spreads of chunks before it, `[batch, heads, places(,
            head_dim)]`, in the dtypes of keys and values. A row's first places are filled; with `max_chunks` the last.
        counts: Chunks of every row, unless they are bounded; a tensor `[batch]` with static shapes.
        older: With `max_chunks` what is older than `chunks`, as one, in at least float32; else `None`.
    """

    window: WindowTokens
    chunks: Summaries
    counts: Counts
    older: Summaries | None

    @staticmethod
    def empty(window: WindowTokens, places: int, max_chunks: int | None, *, has_spread: bool) -> EvaState:
        """No chunks, and room for some, next to tokens like those of `window`."""
        wide = compute_dtype(window.key, window.key, window.value)

        def room(places: int, key: Tensor, value: Tensor) -> Summaries:
            lead = (*key.shape[:2], places)
            keys = key.new_zeros(*lead, key.shape[-1])
            weight = key.new_full(lead, float("-inf"), dtype=wide)
            spread = torch.zeros_like(keys) if has_spread else None
            return Summaries(keys, value.new_zeros(*lead, value.shape[-1]), weight, spread)

        chunks = _narrowed(room(max_chunks or places, window.key, window.value), window)
        if max_chunks is not None:
            return EvaState(window, chunks, (), room(1, window.key.to(wide), window.value.to(wide)))
        # Not the very tensor of `window`: with static shapes each is written to.
        counts = window.counts.clone() if isinstance(window.counts, Tensor) else window.counts
        return EvaState(window, chunks, counts, None)

    def past(self, dtype: torch.dtype) -> EarlierChunks:
        """The chunks, in the dtype in which they are read."""
        return EarlierChunks(self.chunks.map(lambda z: z.to(dtype)), self.older)

    def rows(self, index: Tensor) -> EvaState:
        """Pick rows, as beam search does."""

        def pick(z: Tensor) -> Tensor:
            return z.index_select(0, index)

        older = None if self.older is None else self.older.map(pick)
        return EvaState(self.window.rows(index), self.chunks.map(pick), select_counts(self.counts, index), older)

    def grown(self, window: WindowTokens, fresh: Summaries, number: Tensor | None, chunk_size: int) -> EvaState:
        """With new chunks, of every row the first `number` `[batch]` (`None`: all), and the window's tokens now.

        Raises: InputError for more than there is room for, with static shapes.
        """
        if self.older is not None:
            return self._rolled(window, fresh, number)
        new, counts = fresh.value.shape[2], self.counts
        fresh = _narrowed(fresh, window)
        if not isinstance(counts, Tensor):
            if number is None and len(set(counts)) == 1:
                return EvaState(window, self.chunks.then(fresh), tuple(c + new for c in counts), None)
            added = [new] * len(counts) if number is None else number.tolist()
            counts_now: Counts = tuple(c + n for c, n in zip(counts, added, strict=True))
            places = max(counts_now)
            counts = torch.tensor(counts, device=window.key.device)
        else:
            counts_now, places = counts + (new if number is None else number), self.chunks.value.shape[2]
            if may_look(counts) and bool((counts_now > places).any()):
                raise InputError(
                    f"This state has room for the chunks of {places * chunk_size} tokens; got more. Make it (a"
                    " StaticCache: its max_cache_len) larger, or set max_chunks, with which a state does not grow."
                )
        index = counts[:, None] + torch.arange(new, device=counts.device)
        # Beyond the room that there is: an index that raises anywhere. What is no chunk goes behind all others.
        index = torch.where(index < places, index, places + 1)
        if number is not None:
            index = torch.where(torch.arange(new, device=index.device) < number[:, None], index, places)
        index = index[:, None, :, None]

        def write(room: Tensor, new: Tensor) -> Tensor:
            return room.scatter(2, index.expand(-1, new.shape[1], -1, new.shape[-1]), new)[:, :, :places].clone()

        chunks = self.chunks.padded(0, places + 1 - self.chunks.value.shape[2]).map(write, fresh)
        return EvaState(window, chunks, counts_now, None)

    def _rolled(self, window: WindowTokens, fresh: Summaries, number: Tensor | None) -> EvaState:
        """`grown` with a bounded number: as many of the earliest as are new move into the oldest summary."""
        bound, new = self.chunks.value.shape[2], fresh.value.shape[2]
        row = self.chunks.map(lambda z: z.to(fresh.value.dtype)).then(fresh)
        gone = row.map(lambda z: z[:, :, :new])
        if number is None:
            kept = row.map(lambda z: z[:, :, new:].clone())
        else:
            gone, kept = gone.first(number), row.map(lambda z: take_tokens(z, number, bound))
        assert self.older is not None
        return EvaState(window, _narrowed(kept, window), self.counts, merge_all(self.older.then(gone)))


def _narrowed(chunks: Summaries, window: WindowTokens) -> Summaries:
    """In the dtypes of keys and values. Variances of keys that fit into float16 need not: they take bfloat16."""
    key_dtype, spread = window.key.dtype, chunks.spread
    if spread is not None:
        spread = spread.to(torch.bfloat16 if key_dtype == torch.float16 else key_dtype)
    key_mean, value = chunks.key_mean.to(key_dtype), chunks.value.to(window.value.dtype)
    return replace(chunks, key_mean=key_mean, value=value, spread=spread)
