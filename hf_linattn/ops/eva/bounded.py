"""A bounded number of chunk summaries in causal EVA: the latest ones singly, one for everything older.

Summaries merge like groups under one softmax: with weights `exp(log_weight)`, mean key and value are weighted means,
the log-weight is the logsumexp, and the spread is the weighted mean of the spreads plus the variance of the mean keys.
This is associative, so that a state that grows chunk by chunk gets what the sums over a whole sequence give.

Chunks that a real query reads are all full. So their weights are equal, and a prefix is merged by dividing its sum by
its length. Variances are sums of squares around the first chunk, which every prefix holds: nothing later enters, and
they do not vanish in the squares of a large common part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Blocks, pad_tokens
from .chunks import Summaries
from .layout import Surroundings


def latest_chunks(
    summaries: Summaries, max_chunks: int, num_windows: int, per_window: int, skipped: int
) -> Summaries | None:
    """What every window reads: `max_chunks` of the chunks before it, and as the last member all that came earlier.

    Args:
        summaries: `[batch, heads, chunks(, head_dim)]`, in their order, full where a real query reads them.
        per_window: Chunks of a window. skipped: Whole windows just before its own that a query sees exactly.
    Returns: `[batch, heads, windows, max_chunks + 1(, head_dim)]`, `-inf` in `log_weight` where there is none; `None`
        if no window has more than `max_chunks` chunks to read.
    Cost: O(chunks + windows * max_chunks) times head_dim; nothing of size windows x chunks.
    """
    passed = (torch.arange(num_windows, device=summaries.value.device) - skipped).clamp_min(0) * per_window
    if (num_windows - 1 - skipped) * per_window <= max_chunks:
        return None
    count = summaries.value.shape[2]
    around = Surroundings(Blocks(count, per_window), left=max_chunks + skipped * per_window)

    def latest(z: Tensor) -> Tensor:
        return around.split(z)[..., :max_chunks, :]

    number = passed[:, None] - max_chunks + torch.arange(max_chunks, device=passed.device)
    weight = latest(summaries.log_weight.unsqueeze(-1)).squeeze(-1).masked_fill(number < 0, float("-inf"))
    older = _prefixes(summaries, (passed - max_chunks).clamp_min(0))

    def joined(few: Tensor, one: Tensor) -> Tensor:
        return torch.cat([few, one.unsqueeze(-2)], dim=-2)

    return Summaries(
        joined(latest(summaries.key_mean), older.key_mean),
        joined(latest(summaries.value), older.value),
        torch.cat([weight, older.log_weight.unsqueeze(-1)], dim=-1),
        None if summaries.spread is None or older.spread is None else joined(latest(summaries.spread), older.spread),
    )


def _prefixes(summaries: Summaries, lengths: Tensor) -> Summaries:
    """The first `lengths[w]` chunks, merged, for every w. `[batch, heads, windows(, head_dim)]`."""
    divisor = lengths.clamp_min(1).to(summaries.value.dtype)

    def mean(z: Tensor) -> Tensor:
        sums = pad_tokens(z.cumsum(-2), 1, 0).index_select(-2, lengths)
        return sums / divisor[:, None]

    key_mean, spread = mean(summaries.key_mean), None
    if summaries.spread is not None:
        apart = summaries.key_mean - summaries.key_mean[..., :1, :].detach()
        spread = mean(summaries.spread + apart.square()) - mean(apart).square()
    # `-inf` for none, without a gradient: the logarithm of a constant.
    weight = summaries.log_weight[..., :1] + lengths.to(divisor.dtype).log()
    return Summaries(key_mean, mean(summaries.value), weight, spread)
