"""EVA's control variates: from the tokens of a chunk to the one key and value that stand for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ...kernels.attend import attend
from ...kernels.attention_state import AttentionState, merge_logits, merge_states
from ...kernels.half_norm import half_norm
from ..layout import gather_tokens, masked_mean
from ..noise import Dropped, RowNoise, add_noise
from ..proposal_map import ProposalMap
from ..softmax import mask_logits, softmax_with_lse
from .layout import Chunks

PROPOSALS = ("sum", "mean", "key", "none")
CHUNK_WEIGHTINGS = ("none", "size", "spread")


@dataclass(frozen=True)
class Summaries:
    """What a query needs of the chunks: mean key, value, weight, spread; `[batch, heads, chunks(, head_dim)]`.

    `log_weight` is `-inf` for a chunk that no query reads; if it is `learned`, no log of a size but any number.
    """

    key_mean: Tensor
    value: Tensor
    log_weight: Tensor
    spread: Tensor | None
    learned: bool = False

    def map(self, fn: Callable[..., Tensor], *others: Summaries) -> Summaries:
        """`fn` of everything, also of `others`, as `[batch, heads, ..., chunks, dim]` (`dim` 1 for `log_weight`)."""
        all_of = (self, *others)
        spread = None if self.spread is None else fn(*(s.spread for s in all_of))
        key_mean, value = fn(*(s.key_mean for s in all_of)), fn(*(s.value for s in all_of))
        log_weight = fn(*(s.log_weight.unsqueeze(-1) for s in all_of)).squeeze(-1)
        return Summaries(key_mean, value, log_weight, spread, learned=any(s.learned for s in all_of))

    def then(self, others: Summaries) -> Summaries:
        """These chunks and the others behind them."""
        return self.map(lambda z, other: torch.cat([z, other], dim=-2), others)

    def first(self, number: Tensor) -> Summaries:
        """The first `number` `[batch]` chunks of every row; the others then weigh nothing."""
        is_one = torch.arange(self.value.shape[2], device=number.device) < number[:, None]
        return replace(self, log_weight=mask_logits(self.log_weight, is_one[:, None]))

    def select(self, index: Tensor) -> Summaries:
        """Pick chunks per group: `index` `[batch or 1, groups, members]`, negative for none."""
        picked = self.map(lambda z: gather_tokens(z, index))
        return replace(picked, log_weight=mask_logits(picked.log_weight, (index >= 0)[:, None]))

    def padded(self, before: int, after: int) -> Summaries:
        """With places before and after them that hold no chunk."""
        log_weight = F.pad(self.log_weight, (before, after), value=float("-inf"))
        return replace(self.map(lambda z: F.pad(z, (0, 0, before, after))), log_weight=log_weight)

    def factors(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The estimated log-weight of a chunk, `x . key_mean + log_weight (+ x^2 . spread / 2)`, as dot products.

        Returns: queries `[batch, heads, windows, queries, dim]`, keys `[batch, heads, windows or 1, chunks, dim]`,
            bias and values of the keys.
        """
        query, key = query.to(self.key_mean.dtype), self.key_mean
        if self.spread is not None:
            query, key = torch.cat([query, query.square()], -1), torch.cat([key, self.spread / 2], -1)
        value, bias = self.value, self.log_weight
        if key.ndim == 4:
            key, value, bias = key.unsqueeze(2), value.unsqueeze(2), bias.unsqueeze(2)
        return query, key, bias, value

    def read(self, query: Tensor, visible: Tensor | None, *, dropped: Dropped | None = None) -> AttentionState:
        """Queries read the chunks.

        Args:
            query: `[batch, heads, windows, queries, head_dim]`.
            visible: As in `Chunks`, or `None` with the chunks of every window, `[batch, heads, windows, chunks(,
                head_dim)]`.
            dropped: Chunks that queries do without.
        """
        queries, keys, bias, value = self.factors(query)
        seen = None if visible is None else visible[:, None]
        if dropped is not None:
            logits = queries @ keys.transpose(-1, -2) + bias.unsqueeze(-2)
            return softmax_with_lse(mask_logits(logits, seen), value, dropped=dropped)
        if self.key_mean.ndim > 4:
            return attend(queries, keys, value, bias=bias)
        # Windows as one row of queries: keys, and their gradients, are then not repeated for every window.
        shape = queries.shape[2:4]
        if seen is not None:
            seen = seen.expand(-1, -1, *shape, -1).flatten(2, 3)
        read = attend(queries.flatten(2, 3), keys[:, :, 0], value[:, :, 0], bias=bias[:, :, 0], visible=seen)
        return AttentionState(read.output.unflatten(2, shape), read.lse.unflatten(2, shape))

    def join(self, partial: AttentionState, query: Tensor, *, dropped: Dropped | None = None) -> AttentionState:
        """What queries have read already, and the few chunks of every window, under one softmax."""
        queries, keys, bias, value = self.factors(query)
        if dropped is not None or keys.shape[-2] > value.shape[-1]:
            return merge_states([partial, self.read(query, None, dropped=dropped)])
        return merge_logits(partial, queries @ keys.transpose(-1, -2) + bias.unsqueeze(-2), value)


class MakesSummaries(Protocol):
    """From tokens to the summaries of chunks: `Summariser`, or a learned one (`learned.py`)."""

    @property
    def uses_queries(self) -> bool:
        """Whether summaries depend on the chunk's queries."""

    @property
    def has_spread(self) -> bool:
        """Whether summaries have a `spread`."""

    def __call__(
        self, query: Tensor | None, key: Tensor, value: Tensor, chunks: Chunks, noise: Tensor | RowNoise | bool = False
    ) -> Summaries:
        """Summaries of all chunks."""


@dataclass(frozen=True)
class Summariser:
    """The options of `eva_attention` that decide what a chunk's summary is.

    root: The square root of `scaling`. noise_factor: What standard normal noise is multiplied by.
    """

    proposals: str
    weighting: str
    query_map: ProposalMap | None
    key_map: ProposalMap | None
    root: float
    noise_factor: float = 1.0

    @property
    def uses_queries(self) -> bool:
        return self.proposals in ("sum", "mean")

    @property
    def has_spread(self) -> bool:
        return self.weighting == "spread"

    def check(self) -> None:
        """Raise `InputError` for an unknown name."""
        if self.proposals not in PROPOSALS:
            raise InputError(f"proposals must be one of {list(PROPOSALS)}; got {self.proposals!r}.")
        if self.weighting not in CHUNK_WEIGHTINGS:
            raise InputError(f"weighting must be one of {list(CHUNK_WEIGHTINGS)}; got {self.weighting!r}.")

    def __call__(
        self, query: Tensor | None, key: Tensor, value: Tensor, chunks: Chunks, noise: Tensor | RowNoise | bool = False
    ) -> Summaries:
        """Summaries of all chunks, in float32 or wider.

        The value of a chunk is the paper's coefficient of its control variate at the proposal `mu`,
        `sum_n softmax_n(mu . y_n - |y_n|^2 / 2) v_n`.

        Args:
            query, key: Scaled queries (needed by proposals that are made of them) and keys, `[batch, heads, tokens,
                dim]`.
            noise: As in `eva_attention`.
        """
        member, wide = chunks.member, torch.promote_types(key.dtype, torch.float32)
        keys = chunks.take(key).to(wide)
        centre = masked_mean(keys, member)
        key_mean = self.mapped(centre if chunks.divisor is None else chunks.mean(keys), self.key_map)
        # `mu . y - |y|^2 / 2` is a softmax of the distances between keys and `mu`, which do not change when both are
        # taken relative to the chunk's centre, nor with it: what all keys have in common costs no digits then.
        centre = centre.detach()
        centred = keys - centre.unsqueeze(-2)
        query_mean = None
        if self.uses_queries:
            assert query is not None
            query_mean = chunks.mean(chunks.take(query).to(wide))
        mu = self.proposal(query_mean, key_mean, centre)
        if noise is not False:
            mu = self._noisy(mu, noise, chunks.count)
        bias = mask_logits(-half_norm(centred), member[:, None])
        value = attend(mu.unsqueeze(-2), centred, chunks.take(value).to(wide), bias=bias).output.squeeze(-2)

        log_weight = self.log_weight(member.sum(-1).to(wide), keeps_empty=chunks.divisor is not None)
        spread = None
        if self.weighting == "spread":
            spread = masked_mean(centred.square().masked_fill(~member[:, None, ..., None], 0.0), member)
        return Summaries(key_mean, value, log_weight[:, None].expand(*mu.shape[:-1]), spread)

    def mapped(self, mean: Tensor, proposal_map: ProposalMap | None) -> Tensor:
        """A mean of scaled queries or keys, mapped: maps are defined on means of what came, before scaling."""
        return mean if proposal_map is None else proposal_map(mean / self.root) * self.root

    def proposal(self, query_mean: Tensor | None, key_mean: Tensor, centre: Tensor) -> Tensor:
        """Where a chunk's proposal stands, relative to the chunk's centre.

        Args: query_mean: Where `uses_queries`. key_mean: Mapped. centre: The mean key, without gradient.
        """
        mu = -centre if self.proposals == "none" else key_mean - centre
        if query_mean is not None:
            mu = mu + self.mapped(query_mean, self.query_map)
            mu = (mu - centre) / 2 if self.proposals == "mean" else mu
        return mu

    def log_weight(self, count: Tensor, *, keeps_empty: bool = False) -> Tensor:
        """Of chunks with `count` keys. keeps_empty: One without keys has a weight where all weigh the same."""
        if self.weighting != "none":
            return count.log()
        # The published layout keeps chunks of padding alone: they have a logit, and the value 0.
        return count.log().masked_fill((count > 0) | keeps_empty, 0.0)

    def _noisy(self, mu: Tensor, noise: Tensor | RowNoise | bool, count: int) -> Tensor:
        if isinstance(noise, Tensor):
            if noise.ndim != 4 or noise.shape[2] < count or noise.shape[-1] != mu.shape[-1]:
                raise InputError(
                    f"noise must be [batch, heads, chunks, head_dim] with at least {count} chunks here and head_dim"
                    f" {mu.shape[-1]}; got {tuple(noise.shape)}."
                )
            noise = F.pad(noise.to(mu), (0, 0, 0, mu.shape[2] - noise.shape[2]))
        return add_noise(mu, noise, self.noise_factor)
