"""How short inputs are cut into windows and chunks.

Tokens come before heads, as they lie in the memory of models: `[batch, windows, places of a window, heads, dim]`, and
`[batch, chunks, members, heads, dim]`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """How tokens are cut.

    tokens: Real tokens of every row; what comes after them fills the last window, and the last chunk.
    window, chunk: Tokens of each, one of which divides the other. Of a chunk longer than a window, the windows are
        read one by one, each as a summary, where one of them is the query's own.
    weighs_size: Summaries weigh by their number of tokens, or all the same.
    scaling: Factor of the dot product.
    """

    tokens: int
    window: int
    chunk: int
    weighs_size: bool
    scaling: float

    @property
    def lengths(self) -> list[int]:
        """Tokens of a summary, for every sort of summary."""
        return [self.chunk, self.window] if self.chunk > self.window else [self.chunk]


class Sort(NamedTuple):
    """Summaries of so many tokens each.

    share: One over the number of members, `[chunks, 1, 1]` where it differs; 0 for no member.
    member: `[chunks, members]`, False for a place without a token; `None` if all have one.
    """

    length: int
    share: Tensor | float
    member: Tensor | None


class Places(NamedTuple):
    """What does not depend on values. Summaries of all sorts are numbered one sort after the other.

    near: `[windows, 1, 1, window]`, `-inf` for a place without a token; `None` if all have one.
    seen: `[windows, 1, window]`, 0 for such a place and 1 elsewhere.
    far: `[windows, 1, 1, summaries]`: log-weights of the summaries that a window reads, `-inf` of the others.
    read: `[windows, 1, summaries]`, 1 for those that it reads, 0 for the others.
    log_weight: `[summaries]`, `-inf` for one without a token.
    """

    sorts: list[Sort]
    near: Tensor | None
    seen: Tensor | None
    far: Tensor
    read: Tensor
    log_weight: Tensor


@functools.lru_cache(maxsize=64)
def places(sizes: Sizes, length: int, dtype: torch.dtype) -> Places:
    """The same for every call with these sizes and so many places, on the CPU."""
    hidden = torch.full((), float("-inf"), dtype=dtype, device="cpu")
    real = torch.arange(length, device="cpu") < sizes.tokens
    first = torch.arange(0, length, sizes.window, device="cpu")[:, None]  # of every window
    sorts, weights, reads = [], [], []
    for size in sizes.lengths:
        members = real.view(-1, size).sum(-1).to(dtype)
        weights.append(members.log() if sizes.weighs_size else members.log().clamp_max_(0.0))
        start = torch.arange(0, length, size, device="cpu")
        own = first // size * size == start if size >= sizes.window else first == start // sizes.window * sizes.window
        if size < sizes.chunk:  # windows, where their chunk is not read
            own = own | (start // sizes.chunk != first // sizes.chunk)
        reads.append(~own)
        share: Tensor | float = 1 / size
        if sizes.tokens < length:
            share = (1 / members).masked_fill_(members == 0, 0.0).view(-1, 1, 1)
        sorts.append(Sort(size, share, None if sizes.tokens == length else real.view(-1, size)))
    weight, read = torch.cat(weights), torch.cat(reads, dim=-1)
    far, near = torch.where(read, weight, hidden), None
    if sizes.tokens < length:
        # Windows without a token read something as well, so that no sum of weights is 0.
        seen = real.view(-1, sizes.window)
        seen = seen | ~seen.any(-1, keepdim=True)
        near = torch.where(seen, torch.zeros_like(hidden), hidden)[:, None, None]
    seen_there = None if near is None else seen.to(dtype).unsqueeze(1)
    return Places(sorts, near, seen_there, far[:, None, None], read.to(dtype).unsqueeze(1), weight)
