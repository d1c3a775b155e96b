"""A bounded number of chunk summaries in causal EVA: the latest ones singly, one for everything older.

Summaries merge like groups under one softmax: with weights `exp(log_weight)`, mean key and value are weighted means,
the log-weight is the logsumexp, and the spread is the weighted mean of the spreads plus the variance of the mean keys.
This is associative, so that a state that grows chunk by chunk gets what the sums over a whole sequence give.

Variances over prefixes are sums of squares around the first chunk, which every prefix holds: nothing later enters, and
they do not vanish in the squares of a large common part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.attention_state import AttentionState, log_or_minus_inf, merge_states, shifted_exp
from .chunks import Summaries


@dataclass(frozen=True)
class EarlierChunks:
    """What is left of earlier tokens, in float32 or wider.

    latest: `[batch, heads, chunks(, head_dim)]`, `-inf` in `log_weight` where there is none; with `max_chunks` so many
        of them, the last place for the latest.
    older: With `max_chunks` all that came before, as one chunk; else `None`.
    """

    latest: Summaries
    older: Summaries | None = None

    def together(self) -> Summaries:
        return self.latest if self.older is None else self.older.then(self.latest)


def latest_chunks(
    summaries: Summaries,
    max_chunks: int,
    num_windows: int,
    per_window: int,
    skipped: int,
    past: EarlierChunks | None = None,
) -> Summaries | None:
    """What every window reads: `max_chunks` of the chunks before it, and as the first member all that came earlier.

    Args:
        summaries: `[batch, heads, chunks(, head_dim)]`, in their order.
        per_window: Chunks of a window. skipped: Whole windows just before its own that a query sees exactly.
        past: Chunks before these.
    Returns: `[batch, heads, windows, 1 + max_chunks(, head_dim)]`, `-inf` in `log_weight` where there is none; `None`
        if there is no past and no window has more than `max_chunks` chunks to read.
    Cost: O(chunks + windows * max_chunks) times head_dim; nothing of size windows x chunks.
    """
    if past is None and (num_windows - 1 - skipped) * per_window <= max_chunks:
        return None
    passed = (torch.arange(num_windows, device=summaries.value.device) - skipped).clamp_min(0) * per_window
    missing = max_chunks if past is None else 0
    if past is None:
        older = _merge_prefixes(summaries, (passed - max_chunks).clamp_min(0))
    else:
        older = _merge_prefixes(past.together().then(summaries), 1 + passed)
        summaries = past.latest.then(summaries)

    def latest(z: Tensor) -> Tensor:
        return z.unfold(-2, max_chunks, per_window)[:, :, :num_windows].transpose(-1, -2)

    chunks = summaries.padded(missing + skipped * per_window, 0).map(latest)
    return older.map(lambda z: z.unsqueeze(-2)).then(chunks)


def member_numbers(max_chunks: int, num_windows: int, per_window: int, skipped: int, device: torch.device) -> Tensor:
    """`[windows, 1 + max_chunks]`: of the members that `latest_chunks` gives every window, the number of the chunk,
    from 1 on; 0 for all that came earlier, and where there is none. The options are those of `latest_chunks`."""
    passed = (torch.arange(num_windows, device=device) - skipped).clamp_min(0) * per_window
    latest = passed[:, None] - max_chunks + torch.arange(1, max_chunks + 1, device=device)
    return F.pad(latest.clamp_min(0), (1, 0))


def _merge_prefixes(summaries: Summaries, lengths: Tensor) -> Summaries:
    """The first `lengths[w]` chunks merged, for every w: `[batch, heads, windows(, head_dim)]`."""
    if summaries.learned:
        return _scanned(summaries).padded(1, 0).map(lambda z: z.index_select(-2, lengths))
    return _merge(summaries, lambda z: F.pad(z.cumsum(-2), (0, 0, 1, 0)).index_select(-2, lengths))


def merge_all(summaries: Summaries) -> Summaries:
    """All chunks as one, `[batch, heads, 1(, head_dim)]`."""
    if summaries.learned:
        weights, top = shifted_exp(summaries.log_weight)
        total, log_total = log_or_minus_inf(weights.sum(-1, keepdim=True))
        shares = (weights / total).unsqueeze(-2)
        key_mean, value = shares @ summaries.key_mean, shares @ summaries.value
        return replace(summaries, key_mean=key_mean, value=value, log_weight=log_total + top.unsqueeze(-1))
    return _merge(summaries, lambda z: z.sum(-2, keepdim=True))


def _scanned(summaries: Summaries) -> Summaries:
    """Every prefix of the chunks merged, of any log-weights: no sum of weights, which would overflow.

    Merged pairs, then pairs of these, and so on (Hillis and Steele's scan): a prefix knows its own chunks alone.
    """
    count, step = summaries.value.shape[2], 1
    while step < count:
        before = summaries.padded(step, 0).map(lambda z: z[:, :, :count])
        key_mean = merge_states([AttentionState(s.key_mean, s.log_weight) for s in (before, summaries)])
        value = merge_states([AttentionState(s.value, s.log_weight) for s in (before, summaries)])
        summaries = replace(summaries, key_mean=key_mean.output, value=value.output, log_weight=value.lse)
        step *= 2
    return summaries


def _merge(summaries: Summaries, sums: Callable[[Tensor], Tensor]) -> Summaries:
    """Chunks merged, given which sums over them to take. Variances are around the first chunk that there is."""
    weight = summaries.log_weight.exp().unsqueeze(-1)
    total, log_total = log_or_minus_inf(sums(weight))

    def mean(z: Tensor) -> Tensor:
        return sums(weight * z) / total

    spread = None
    if summaries.spread is not None:
        first = (weight > 0).to(torch.uint8).argmax(-2, keepdim=True).expand(*weight.shape[:2], 1, weight.shape[-1])
        centre = summaries.key_mean.detach().gather(-2, first.expand(-1, -1, -1, summaries.key_mean.shape[-1]))
        apart = summaries.key_mean - centre
        spread = mean(summaries.spread + apart.square()) - mean(apart).square()
    return Summaries(mean(summaries.key_mean), mean(summaries.value), log_total.squeeze(-1), spread)
