"""A recurrent form whose first tokens read each other exactly: what `exact_below` is in a causal layer with a cache.

Beside the state of the kind, which takes in all tokens, the keys and values of each row's first ones are kept until
every row has had so many. A query among them reads these in place of the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..exact import exact_softmax, masked_softmax
from ..padding import real_tokens_first, reorder_tokens
from .protocol import Recurrence, State
from .window_tokens import Counts, WindowTokens, may_look, select_counts

S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class StartState(Generic[S]):
    """What is kept of the tokens seen so far.

    Args:
        kind: The state of the kind's own recurrent form.
        key, value: Of each row's first tokens, `[batch, heads, places, head_dim]`, in the first places. With static
            shapes there are always as many places as may be needed; else none once every row has had its tokens.
        counts: How many of its first tokens a row has had; a tensor `[batch]` with static shapes.
    """

    kind: S
    key: Tensor
    value: Tensor
    counts: Counts

    @property
    def window(self) -> WindowTokens:
        return self.kind.window

    def rows(self, index: Tensor) -> StartState[S]:
        """Pick rows, as beam search does."""
        key, value = self.key.index_select(0, index), self.value.index_select(0, index)
        return StartState(self.kind.rows(index), key, value, select_counts(self.counts, index))  # type: ignore[arg-type]

    @property
    def is_even(self) -> bool:
        """Whether Python knows that there is a token in every place."""
        return not isinstance(self.counts, Tensor) and all(count == self.key.shape[2] for count in self.counts)

    def count(self) -> Tensor:
        """`[batch]`."""
        if isinstance(self.counts, Tensor):
            return self.counts
        return torch.tensor(self.counts, device=self.key.device)

    def mask(self) -> Tensor:
        """`[batch, places]`, True where there is a token."""
        return torch.arange(self.key.shape[2], device=self.key.device) < self.count()[:, None]


@dataclass(frozen=True)
class ExactStart(Generic[S]):
    """A recurrent form round another one. No method changes the state it is given.

    Args:
        kind: That of the kind.
        exact_below: So many first tokens of a row are softmax attention; at least 1.
        scaling: Factor of the dot product.
    """

    kind: Recurrence[S]
    exact_below: int
    scaling: float

    @property
    def keeps_queries(self) -> bool:
        return self.kind.keeps_queries

    def start(self, key: Tensor, value: Tensor, *, static_tokens: int | None = None) -> StartState[S]:
        """The state before the first token, for keys and values like these; `static_tokens` for static shapes."""
        places, counts = 0, cast(Counts, (0,) * key.shape[0])
        if static_tokens is not None:
            places, counts = self.exact_below, torch.zeros(key.shape[0], dtype=torch.long, device=key.device)
        kind = self.kind.start(key, value, static_tokens=static_tokens)
        return StartState(kind, _room(key, places), _room(value, places), counts)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, state: StartState[S]
    ) -> Tensor:
        """What the last tokens read, in the parallel form.

        Args:
            query: `[batch, heads, queries, head_dim]`, the last of the new tokens.
            key, value: `[batch, heads, tokens, head_dim]`, all new tokens. key_mask: `[batch, tokens]`.
        Returns: `[batch, heads, queries, head_dim]`, dtype of `query`.
        """
        output = self.kind.attend(query, key, value, key_mask, state.kind)
        if self._is_over(state):
            return output
        queries, tokens, counts = query.shape[2], key.shape[2], state.counts
        most = min(self.exact_below - (0 if isinstance(counts, Tensor) else min(counts)), tokens)
        if key_mask is None and state.is_even:
            number = most - (tokens - queries)
            if number <= 0:
                return output
            key, value = torch.cat([state.key, key[:, :, :most]], 2), torch.cat([state.value, value[:, :, :most]], 2)
            exact = exact_softmax(query[:, :, :number], key, value, scaling=self.scaling, is_causal=True)
            return torch.cat([exact, output[:, :, number:]], dim=2)
        mask = key.new_ones(key.shape[0], tokens, dtype=torch.bool) if key_mask is None else key_mask
        order, real = real_tokens_first(mask)
        order, real = order[:, :most], real[:, :most]
        query = F.pad(query, (0, 0, tokens - queries, 0))
        query, key, value = (reorder_tokens(z, order, real) for z in (query, key, value))
        earlier = torch.ones(most, most, dtype=torch.bool, device=key.device).tril()
        seen = torch.cat([state.mask()[:, None].expand(-1, most, -1), earlier.expand(key.shape[0], -1, -1)], -1)
        key, value = torch.cat([state.key, key], 2), torch.cat([state.value, value], 2)
        exact = masked_softmax(query, key, value, seen[:, None], scaling=self.scaling)
        place = mask.long().cumsum(-1) - 1
        short = mask & (state.count()[:, None] + place < self.exact_below)
        place = place.clamp(0, most - 1)[:, None, tokens - queries :, None]
        exact = exact.gather(2, place.expand(-1, exact.shape[1], -1, exact.shape[-1]))
        return torch.where(short[:, None, tokens - queries :, None], exact, output)

    def absorb(
        self, query: Tensor | None, key: Tensor, value: Tensor, key_mask: Tensor | None, state: StartState[S]
    ) -> StartState[S]:
        """The state after these tokens as well."""
        kind, most, counts = self.kind.absorb(query, key, value, key_mask, state.kind), self.exact_below, state.counts
        if self._is_over(state):
            return replace(state, kind=kind)
        key, value = torch.cat([state.key, key], 2), torch.cat([state.value, value], 2)
        tokens = key.shape[2] - state.key.shape[2]
        if key_mask is None and state.is_even:
            after = (min(key.shape[2], most),) * key.shape[0]
            # Copied: a view would keep all tokens alive.
            return self._kept(StartState(kind, key[:, :, :most].clone(), value[:, :, :most].clone(), after))
        new = key.new_ones(key.shape[0], tokens, dtype=torch.bool) if key_mask is None else key_mask
        order, real = real_tokens_first(torch.cat([state.mask(), new], dim=1))
        total = (state.count() + new.sum(-1)).clamp_max(most)
        if not isinstance(counts, Tensor):
            after = tuple(total.tolist())
            most = max(after)
        order, real = order[:, :most], real[:, :most]
        key, value = reorder_tokens(key, order, real), reorder_tokens(value, order, real)
        return self._kept(StartState(kind, key, value, total if isinstance(counts, Tensor) else after))

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, state: StartState[S], valid: Tensor | None = None
    ) -> tuple[Tensor, StartState[S]]:
        """One token of every row, `[batch, heads, 1, head_dim]`: `attend` and `absorb` in a few operations.

        Args:
            valid: `[batch]`, False for a row whose token is padding; static shapes only.
        """
        output, kind = self.kind.step(query, key, value, state.kind, valid)
        if self._is_over(state):
            return output, replace(state, kind=kind)
        counts, most, before = state.counts, self.exact_below, state.count()
        places, after = most, cast(Counts, ())
        if isinstance(counts, Tensor):
            after = (counts + (1 if valid is None else valid.long())).clamp_max(most)
        else:
            after = tuple(min(count + 1, most) for count in counts)
            places = max(after)
        place = torch.arange(places, device=key.device)
        here = place == before[:, None]  # in no place of a row that has had its tokens
        here = (here if valid is None else here & valid[:, None])[:, None, :, None]
        more = places - state.key.shape[2]

        def write(own: Tensor, new: Tensor) -> Tensor:
            return torch.where(here, new.to(own.dtype), F.pad(own, (0, 0, 0, more)) if more else own)

        key, value = write(state.key, key), write(state.value, value)
        seen = (place <= before[:, None])[:, None, None]
        exact = masked_softmax(query, key, value, seen, scaling=self.scaling)
        short = before < most if valid is None else (before < most) & valid
        output = torch.where(short[:, None, None, None], exact, output)
        return output, self._kept(StartState(kind, key, value, after))

    def _is_over(self, state: StartState[S]) -> bool:
        """Whether every row has had its first tokens; with static shapes only where looking costs nothing."""
        if not isinstance(state.counts, Tensor):
            return min(state.counts) >= self.exact_below
        return may_look(state.counts) and bool((state.counts >= self.exact_below).all())

    def _kept(self, state: StartState[S]) -> StartState[S]:
        """Without the tokens that no query reads any more."""
        if isinstance(state.counts, Tensor) or not self._is_over(state):
            return state
        return StartState(state.kind, _room(state.key, 0), _room(state.value, 0), state.counts)


def _room(like: Tensor, places: int) -> Tensor:
    return like.new_zeros(*like.shape[:2], places, like.shape[-1])
