"""Flash attention with a log-sum-exp, written with matrix products: for CPUs where these beat torch's flash attention.

Tiles of logits stay in the caches; a running maximum and sum join the tiles of keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cpu_matmul import matrix_product, suits_onednn

# Logits of a tile, and most keys of one.
_TILE = 1 << 18
_KEYS = 1024


def suits_streaming(query: Tensor, key: Tensor) -> bool:
    """Whether matrices are large enough for this."""
    columns = min(key.shape[2], _KEYS)
    return suits_onednn(query, min(query.shape[2], _TILE // columns) * columns * query.shape[-1])


def streamed_forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`attend_forward` in float32, without `visible`."""
    output = value.new_empty(*query.shape[:-1], value.shape[-1])
    lse = value.new_empty(query.shape[:-1])
    step = max(1, _TILE // min(key.shape[2], _KEYS))
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            keys, values = key[batch, head], value[batch, head]
            own_bias = None if bias is None else bias[batch, head]
            for start in range(0, query.shape[2], step):
                place = (batch, head, slice(start, start + step))
                _attend(query[place], keys, values, own_bias, output[place], lse[place])
    return output, lse


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, output: Tensor, lse: Tensor) -> None:
    """All keys for some queries of one head, into `output` and `lse`."""
    top = total = result = None
    for logits, values in _tiles(query, key, value, bias):
        highest = logits.amax(-1, keepdim=True)
        highest = highest.clamp_min_(torch.finfo(logits.dtype).min) if top is None else torch.maximum(highest, top)
        weights = logits.sub_(highest).exp_()
        part, sums = matrix_product(weights, values), weights.sum(-1, keepdim=True)
        if top is None or result is None or total is None:
            result, total = part, sums
        else:
            scale = (top - highest).exp_()
            result, total = result.mul_(scale).add_(part), total.mul_(scale).add_(sums)
        top = highest
    assert top is not None and total is not None and result is not None  # noqa: PT018 (there is a key)
    empty = total == 0
    torch.div(result, total.masked_fill_(empty, 1.0), out=output)
    lse.copy_(total.log_().add_(top).masked_fill_(empty, float("-inf")).squeeze(-1))


def _tiles(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, key.shape[0], _KEYS):
        part = slice(start, start + _KEYS)
        logits = matrix_product(query, key[part].mT)
        yield (logits if bias is None else logits.add_(bias[part])), value[part]
