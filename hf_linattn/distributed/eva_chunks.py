r"""Summaries of EVA's chunks, of which a process has some tokens, or none.

A chunk is cut where it crosses the border of two parts. Its means are sums over processes. Its value is a softmax over
its keys, whose weights are relative to the largest logit of the chunk on any process, and so a quotient of two sums:

    value   u_c = sum_n exp(l_n - m_c) v_n / sum_n exp(l_n - m_c)      m_c = max_n l_n,  sums over all processes

Sums over processes give every process all summaries, and in the backward pass each key what all of them read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.attention_state import log_or_minus_inf
from ..kernels.half_norm import half_norm
from ..ops.eva.chunks import Summaries, Summariser
from ..ops.eva.learned import LearnedSummariser
from ..ops.noise import RowNoise, add_noise
from ..ops.padding import Tokens
from .collectives import SequenceGroup


@dataclass(frozen=True)
class SharedChunks:
    """All chunks of whole rows, and where the tokens of this process belong.

    count: `[batch or 1, chunks]`, real tokens of a chunk, on all processes.
    number: `[batch or 1, units]`, the chunk of every `unit` tokens here.
    unit: Divides the length of every chunk, and of a part.
    valid: `[batch, tokens]`, True for a real token here; `None` if all are.
    """

    count: Tensor
    number: Tensor
    unit: int
    valid: Tensor | None

    def split(self, x: Tensor) -> Tensor:
        """`[batch, heads, tokens, dim]` -> `[batch, heads, units, unit, dim]`."""
        return x.unflatten(2, (-1, self.unit))

    def masked(self, x: Tensor, filling: float) -> Tensor:
        """With `filling` at the padding; `x` as `split` gives it."""
        if self.valid is None:
            return x
        return x.masked_fill(~self.split(self.valid[:, None, :, None]), filling)

    def sums(self, x: Tensor) -> Tensor:
        """Over the tokens here, `[batch, heads, chunks, dim]`."""
        x = x.sum(3)
        return self._room(x, 0.0).scatter_add(2, self._index(x), x)

    @torch.no_grad()
    def maxima(self, x: Tensor) -> Tensor:
        """Over the tokens here; `-inf` for a chunk that has none."""
        x = x.amax(3)
        return self._room(x, float("-inf")).scatter_reduce(2, self._index(x), x, "amax")

    def at_tokens(self, z: Tensor) -> Tensor:
        """What belongs to chunks, `[batch, heads, chunks, dim]`, for every unit: `[batch, heads, units, 1, dim]`."""
        return z.gather(2, self._index(z)).unsqueeze(3)

    def _index(self, x: Tensor) -> Tensor:
        return self.number[:, None, :, None].expand(*x.shape[:2], -1, x.shape[-1])

    def _room(self, x: Tensor, filling: float) -> Tensor:
        return x.new_full((*x.shape[:2], self.count.shape[1], x.shape[-1]), filling)


def chunk_summaries(
    summarise: Summariser | LearnedSummariser,
    tokens: Tokens,
    chunks: SharedChunks,
    group: SequenceGroup,
    noise: RowNoise | None = None,
) -> Summaries:
    """Summaries of all chunks, `[batch, heads, chunks(, head_dim)]`, in float32 or wider: the same on all processes.

    Args: tokens: Those here, scaled, with 0 for padding. noise: Of the proposals, the same on all processes.
    """
    if isinstance(summarise, LearnedSummariser):
        return _learned(summarise, tokens, chunks, group)
    return _variates(summarise, tokens, chunks, group, noise)


def exchanged(summaries: Summaries, exchange: Callable[[Tensor], Tensor]) -> Summaries:
    """`exchange` of summaries as one tensor, `[batch, heads, chunks, numbers of a chunk]`."""
    pieces = [summaries.key_mean, summaries.value, summaries.log_weight.unsqueeze(-1)]
    if summaries.spread is not None:
        pieces.append(summaries.spread)
    found = exchange(torch.cat(pieces, -1)).split([piece.shape[-1] for piece in pieces], -1)
    spread = found[3] if summaries.spread is not None else None
    return Summaries(found[0], found[1], found[2].squeeze(-1), spread, summaries.learned)


def _variates(
    summarise: Summariser, tokens: Tokens, chunks: SharedChunks, group: SequenceGroup, noise: RowNoise | None
) -> Summaries:
    """`Summariser.__call__` with sums over processes."""
    wide = torch.promote_types(tokens.key.dtype, torch.float32)
    keys, values, dim = chunks.split(tokens.key.to(wide)), chunks.split(tokens.value.to(wide)), tokens.key.shape[-1]
    used = [keys, chunks.split(tokens.query.to(wide))] if summarise.uses_queries else [keys]
    count = chunks.count.to(wide)[:, None, :, None]
    centre, *query_means = (group.reduce(chunks.sums(torch.cat(used, -1))) / count.clamp_min(1)).split(dim, -1)
    key_mean, centre = summarise.mapped(centre, summarise.key_map), centre.detach()
    mu = summarise.proposal(query_means[0] if query_means else None, key_mean, centre)
    mu = add_noise(mu, noise or False, summarise.noise_factor)
    centred = keys - chunks.at_tokens(centre)
    logits = (chunks.at_tokens(mu) * centred).sum(-1, keepdim=True) - half_norm(centred).unsqueeze(-1)
    weights = _shifted_exp(logits, chunks, group)
    parts = [weights * values, weights]
    if summarise.has_spread:
        parts.append(chunks.masked(centred.square(), 0.0))
    value, total, *squares = _sums(parts, chunks, group)
    spread = squares[0] / count.clamp_min(1) if squares else None
    log_weight = summarise.log_weight(chunks.count.to(wide))[:, None].expand(*mu.shape[:-1])
    return Summaries(key_mean, value / log_or_minus_inf(total)[0], log_weight, spread)


def _learned(summarise: LearnedSummariser, tokens: Tokens, chunks: SharedChunks, group: SequenceGroup) -> Summaries:
    """`LearnedSummariser.__call__` with sums over processes."""
    wide = torch.promote_types(tokens.key.dtype, torch.float32)
    maps, keys, values = summarise.to(wide), chunks.split(tokens.key.to(wide)), chunks.split(tokens.value.to(wide))
    pooling = torch.stack([maps.key_pooling, maps.value_pooling], -1)  # [heads, head_dim, 2]
    weights = _shifted_exp(keys @ pooling[:, None], chunks, group)
    of_keys, of_values = weights.split(1, -1)
    key, value, totals = _sums([of_keys * keys, of_values * values, weights], chunks, group)
    total_of_keys, total_of_values = log_or_minus_inf(totals)[0].split(1, -1)
    return maps.of_pooled(key / total_of_keys, value / total_of_values, chunks.count.to(wide))


def _shifted_exp(logits: Tensor, chunks: SharedChunks, group: SequenceGroup) -> Tensor:
    """`exp(logits - largest of the chunk)`, 0 for padding; `logits` as `split` gives it."""
    logits = chunks.masked(logits, float("-inf"))
    top = group.maximum(chunks.maxima(logits)).clamp_min(torch.finfo(logits.dtype).min)
    return (logits - chunks.at_tokens(top)).exp()


def _sums(parts: list[Tensor], chunks: SharedChunks, group: SequenceGroup) -> list[Tensor]:
    """Over all processes, in one exchange."""
    sums = group.reduce(torch.cat([chunks.sums(part) for part in parts], -1))
    return list(sums.split([part.shape[-1] for part in parts], -1))
