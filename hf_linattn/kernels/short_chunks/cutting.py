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

    tokens: Real tokens of every row; what comes after them fills the last window.
    window, chunk: Tokens of each; a chunk divides a window.
    weighs_size: Chunks weigh by their number of tokens, or all the same.
    scaling: Factor of the dot product.
    """

    tokens: int
    window: int
    chunk: int
    weighs_size: bool
    scaling: float


class Places(NamedTuple):
    """What does not depend on values.

    log_weight: `[chunks]`, `-inf` for one without a token. share: One over the number of members, `[chunks, 1, 1]`
    where it differs; 0 for no member.
    near: `[windows, 1, 1, window]`, `-inf` for a place without a token; `None` if all have one.
    far: `[windows, 1, 1, chunks]`: `log_weight` of the chunks that a window reads, `-inf` of the others.
    member: `[chunks, members]`, False for a place without a token; `None` if all have one.
    seen: `[windows, 1, window]`, `read`: `[windows, 1, chunks]`: the same as factors, 1 or 0.
    """

    log_weight: Tensor
    share: Tensor | float
    near: Tensor | None
    far: Tensor
    member: Tensor | None
    seen: Tensor | None
    read: Tensor


@functools.lru_cache(maxsize=64)
def places(sizes: Sizes, dtype: torch.dtype) -> Places:
    """The same for every call with these sizes, on the CPU."""
    tokens, window, chunk = sizes[:3]
    count, per_window = -(-tokens // window), window // chunk
    real = torch.arange(count * window, device="cpu") < tokens
    members = real.view(-1, chunk).sum(-1).to(dtype)
    weight = members.log() if sizes.weighs_size else members.log().clamp_max_(0.0)
    hidden = torch.full((), float("-inf"), dtype=dtype, device="cpu")
    own = torch.arange(len(members), device="cpu") // per_window == torch.arange(count, device="cpu")[:, None]
    far = torch.where(own, hidden, weight)[:, None, None]
    read = (~own).to(dtype).unsqueeze(1)
    if tokens % window == 0:
        return Places(weight, 1 / chunk, None, far, None, None, read)
    near = torch.where(real, torch.zeros_like(hidden), hidden).view(count, 1, 1, window)
    share = (1 / members).masked_fill_(members == 0, 0.0).view(-1, 1, 1)
    return Places(weight, share, near, far, real.view(-1, chunk), real.to(dtype).view(count, 1, window), read)
