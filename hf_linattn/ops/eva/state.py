"""What causal EVA keeps of the tokens it has seen: chunk summaries, and the tokens of the window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ..inputs import compute_dtype
from ..recurrent.window_tokens import Counts, WindowTokens
from .bounded import EarlierChunks, merge_all, merge_summaries
from .chunks import Summaries


@dataclass(frozen=True)
class EvaState:
    """What is kept of the tokens seen so far.

    Args:
        near: The tokens of the window, with their queries where proposals are made of them.
        chunks: Mean keys (scaled), values, log-weights and spreads of chunks before it, `[batch, heads, places(,
            head_dim)]`, in the dtypes of keys and values. A row's first places are filled; with `max_chunks` the last.
        counts: Chunks of every row, unless they are bounded; a tensor `[batch]` with static shapes.
        older: With `max_chunks` what is older than `chunks`, as one, in at least float32; else `None`.
    """

    near: WindowTokens
    chunks: Summaries
    counts: Counts
    older: Summaries | None

    @staticmethod
    def empty(near: WindowTokens, places: int, max_chunks: int | None, *, has_spread: bool) -> EvaState:
        """No chunks, and room for some, next to tokens like those of `near`."""
        wide = compute_dtype(near.key, near.key, near.value)

        def room(places: int, key: Tensor, value: Tensor) -> Summaries:
            lead = (*key.shape[:2], places)
            keys = key.new_zeros(*lead, key.shape[-1])
            weight = key.new_full(lead, float("-inf"), dtype=wide)
            spread = torch.zeros_like(keys) if has_spread else None
            return Summaries(keys, value.new_zeros(*lead, value.shape[-1]), weight, spread)

        if max_chunks is not None:
            older = room(1, near.key.to(wide), near.value.to(wide))
            return EvaState(near, _narrowed(room(max_chunks, near.key, near.value), near), (), older)
        # Not the very tensor of `near`: with static shapes each is written to.
        counts = near.counts.clone() if isinstance(near.counts, Tensor) else near.counts
        return EvaState(near, _narrowed(room(places, near.key, near.value), near), counts, None)

    def past(self, dtype: torch.dtype) -> EarlierChunks:
        """The chunks, in the dtype in which they are read."""
        return EarlierChunks(self.chunks.map(lambda z: z.to(dtype)), self.older)

    def rows(self, index: Tensor) -> EvaState:
        """Pick rows, as beam search does."""
        if isinstance(self.counts, Tensor):
            counts: Counts = self.counts.index_select(0, index)
        elif len(set(self.counts)) < 2:
            counts = self.counts[:1] * index.shape[0]
        else:
            counts = tuple(self.counts[row] for row in index.tolist())

        def pick(z: Tensor) -> Tensor:
            return z.index_select(0, index)

        older = None if self.older is None else self.older.map(pick)
        return EvaState(self.near.rows(index), self.chunks.map(pick), counts, older)

    def grown(self, near: WindowTokens, fresh: Summaries, number: Tensor | None, chunk_size: int) -> EvaState:
        """With new chunks, of every row the first `number` `[batch]` (`None`: all), and what is near now.

        Raises: InputError for more than there is room for, with static shapes.
        """
        if self.older is not None:
            return self._rolled(near, fresh, number)
        new, counts = fresh.value.shape[2], self.counts
        fresh = _narrowed(fresh, near)
        if not isinstance(counts, Tensor):
            added = [new] * len(counts) if number is None else number.tolist()
            if number is None and len(set(counts)) == 1:
                return EvaState(near, self.chunks.then(fresh), tuple(c + new for c in counts), None)
            counts_now: Counts = tuple(c + n for c, n in zip(counts, added, strict=True))
            places = max(counts_now)
            counts = torch.tensor(counts, device=near.key.device)
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
        chunks = _write(self.chunks, fresh, index, places)
        return EvaState(near, chunks, counts_now, None)

    def _rolled(self, near: WindowTokens, fresh: Summaries, number: Tensor | None) -> EvaState:
        """`grown` with a bounded number: as many of the earliest as are new move into the oldest summary."""
        wide, bound, new = fresh.value.dtype, self.chunks.value.shape[2], fresh.value.shape[2]
        assert self.older is not None
        row = self.chunks.map(lambda z: z.to(wide)).then(fresh)
        if number is None:
            gone, kept = row.map(lambda z: z[:, :, :new]), row.map(lambda z: z[:, :, new:].clone())
        else:
            gone = row.map(lambda z: z[:, :, :new]).first(number)
            index = number[:, None] + torch.arange(bound, device=number.device)

            def take(z: Tensor) -> Tensor:
                return z.gather(2, index[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[-1]))

            kept = row.map(take)
        older = merge_summaries(self.older, merge_all(gone))
        return EvaState(near, _narrowed(kept, near), self.counts, older)


def may_look(tensor: Tensor) -> bool:
    """Whether reading a value costs nothing: on the CPU, and not while compiling."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _narrowed(chunks: Summaries, near: WindowTokens) -> Summaries:
    """In the dtypes of keys and values. Variances of keys that fit into float16 need not: they take bfloat16."""
    spread = chunks.spread
    if spread is not None:
        spread = spread.to(torch.bfloat16 if near.key.dtype == torch.float16 else near.key.dtype)
    return Summaries(chunks.key_mean.to(near.key.dtype), chunks.value.to(near.value.dtype), chunks.log_weight, spread)


def _write(chunks: Summaries, fresh: Summaries, index: Tensor, places: int) -> Summaries:
    """`fresh` at the places `index` `[batch, new]`, of which `places` means none."""
    own = chunks.value.shape[2]

    def write(z: Tensor, new: Tensor, empty: float = 0.0) -> Tensor:
        room = F.pad(z, (0, 0, 0, places + 1 - own), value=empty)
        where = index[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[-1])
        return room.scatter(2, where, new)[:, :, :places].clone()

    weight = write(chunks.log_weight.unsqueeze(-1), fresh.log_weight.unsqueeze(-1), float("-inf"))
    spread = None
    if chunks.spread is not None and fresh.spread is not None:
        spread = write(chunks.spread, fresh.spread)
    return Summaries(
        write(chunks.key_mean, fresh.key_mean), write(chunks.value, fresh.value), weight.squeeze(-1), spread
    )
