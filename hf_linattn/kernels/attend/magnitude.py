"""How large logits may be before their rounding shows in weights that are recomputed from a stored log mass.

A logit is rounded by about `eps` times what it is summed from, and the sum may be formed differently in the two
directions: then `exp(logit - lse)` is off by that much, and the weights of a query do not add up to one. Of
ordinary numbers nothing of it is seen. Where products reach into the hundreds, the backward pass normalises anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of `|query| |key| + |bias|`.
_ORDINARY = 128.0


def is_large(query: Tensor, key: Tensor, bias: Tensor | None) -> bool:
    """Whether logits `query . key + bias` may be so large that weights have to be normalised anew.

    Always, where looking would make a device wait. Cost: one pass over the inputs.
    """
    if query.device.type != "cpu":
        return True
    if not query.numel() or not key.numel():
        return False
    size = _longest(query) * _longest(key)
    if bias is not None and bias.numel():
        bias = unexpanded(bias)
        size = size + bias.masked_fill(bias == float("-inf"), 0.0).abs().amax()
    return not bool(size <= _ORDINARY)


def _longest(x: Tensor) -> Tensor:
    """The length of the longest vector of the last dimension."""
    x = unexpanded(x)
    return torch.linalg.vecdot(x, x).amax().to(torch.promote_types(x.dtype, torch.float32)).sqrt()


def unexpanded(x: Tensor) -> Tensor:
    """`x` without repetitions in any dimension but the last."""
    for dim, stride in enumerate(x.stride()[:-1]):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x
