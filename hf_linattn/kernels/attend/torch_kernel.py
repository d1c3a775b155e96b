"""`attend` in plain torch, for every device: a flash kernel where torch has a fast one, tiles elsewhere.

No `[queries, keys]` matrix is ever whole in memory. All tensors have four dimensions, `[batch, heads, tokens, dim]`;
strides may be 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cpu_matmul import LARGE, product, suits_onednn
from .flash_onednn import streamed_forward, suits_streaming

_FLASH_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Elements of a tile of logits: large enough for matrix products, small enough for the caches of one CPU core.
_TILE = {"cpu": 1 << 20}
_LARGE_TILE = 1 << 25
# The same of a single head.
_TILE_ALONE = 1 << 18


def attend_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax of `query . key + bias` over the keys, applied to `value`, and its log-sum-exp.

    Args:
        query: `[batch, heads, queries, dim]`. key: `[batch, heads, keys, dim]`. value: `[batch, heads, keys,
            head_dim]`.
        bias: `[batch, heads, keys]`, of the precision of `lse`.
        visible: `[batch, heads, queries, keys]` bool.
    Returns: output like `query` with the dtype of `value`, and lse `[batch, heads, queries]` in float32 or wider.
        A query that sees nothing has output 0 and lse `-inf`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    if 0 in query.shape[:-1] or not key.shape[2]:  # not a single logit: torch's flash kernel ends the process then
        lse = torch.full(query.shape[:-1], float("-inf"), dtype=wide, device=query.device)
        return value.new_zeros(*query.shape[:-1], value.shape[-1]), lse
    queries, keys, dim = query.shape[2], key.shape[2], query.shape[-1]
    if not (query.device.type == "cpu" and query.dtype == key.dtype == value.dtype in _FLASH_DTYPES):
        return _tiled_forward(query, key, value, bias, visible)
    if visible is None and queries * keys * dim >= LARGE and suits_streaming(query, key):
        return streamed_forward(query, key, value, bias)
    if dim != value.shape[-1]:
        return _tiled_forward(query, key, value, bias, visible)
    # The flash kernel of torch. Bias and mask are added to the logits, with dimensions of 1 where they do not differ.
    mask = expanded = None
    if bias is not None:
        mask = (bias if bias.is_contiguous() else _unexpanded(bias)).unsqueeze(-2).to(wide)
    if visible is not None:
        seen = _unexpanded(visible)
        hidden = torch.zeros(seen.shape, dtype=wide, device=seen.device).masked_fill_(~seen, float("-inf"))
        mask = hidden if mask is None else hidden + mask
    if mask is not None:
        expanded = mask.expand(*query.shape[:-1], keys)
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=expanded, scale=1.0
    )
    output, lse = output.contiguous(), lse.to(wide)
    if mask is not None:
        # The kernel's log-sum-exp of a row without visible keys is 0.
        empty = mask.amax(-1) == float("-inf")
        if bool(empty.any()):
            lse = lse.masked_fill(empty, float("-inf"))
            output = output.masked_fill(empty.unsqueeze(-1), 0.0)
    return output, lse.contiguous()


def _tiled_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tile by tile, where torch has no flash kernel with a log-sum-exp."""
    wide = torch.promote_types(query.dtype, torch.float32)
    output = value.new_empty(*query.shape[:-1], value.shape[-1])
    lse = torch.empty(query.shape[:-1], dtype=wide, device=query.device)
    for part in _tiles(query, key, by_keys=False):
        weights = _logits(query, key, bias, visible, part)
        top = weights.amax(-1, keepdim=True).clamp_min_(torch.finfo(wide).min)
        weights.sub_(top).exp_()
        total = weights.sum(-1)
        empty = total == 0
        total.masked_fill_(empty, 1.0)
        mean = weights.to(value.dtype) @ value[part.lead]
        output[part.queries] = (mean / total.unsqueeze(-1)).to(output.dtype)
        lse[part.queries] = total.log_().add_(top.squeeze(-1)).masked_fill_(empty, float("-inf"))
    return output, lse


def attend_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    output: Tensor,
    lse: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value and bias, where `needs` says so. The weights are computed again, tile by tile.

    With `p` the weights, the gradient of a logit is `p (grad_output . value - grad_output . output + grad_lse)`.
    Logits and sums are in float32 or wider, the other products in the dtype of the inputs. Large logits (`_is_large`)
    are normalised again: `output` and `lse` are those of logits that were rounded differently.
    """
    wide = lse.dtype
    if 0 in query.shape[:-1] or not key.shape[2]:
        bias_like = lse.new_empty(key.shape[:-1])
        return tuple(  # type: ignore[return-value]
            z.new_zeros(z.shape) if needed else None
            for z, needed in zip((query, key, value, bias_like), needs, strict=True)
        )
    # Where nothing is visible all logits are -inf: weights and gradients are 0 whatever is taken off, and the gradient
    # of the log-sum-exp, which may be NaN, does not count.
    empty = lse == float("-inf")
    offset, total = lse.masked_fill(empty, 0.0), None
    by_keys, narrow = key.shape[2] > query.shape[2], torch.promote_types(query.dtype, key.dtype)
    if _is_large(query, key, bias):
        offset, total, shift = _normalised(grad_output, query, key, value, bias, visible, by_keys=by_keys)
    else:
        shift = (grad_output.to(wide) * output.to(wide)).sum(-1)
    shift = (shift - grad_lse).masked_fill_(empty, 0.0)
    grad_query = torch.empty(query.shape, dtype=wide, device=query.device) if needs[0] else None
    grad_key = torch.empty(key.shape, dtype=wide, device=key.device) if needs[1] else None
    grad_value = torch.empty(value.shape, dtype=wide, device=value.device) if needs[2] else None
    grad_bias = torch.empty(key.shape[:-1], dtype=wide, device=key.device) if needs[3] else None
    for part in _tiles(query, key, by_keys=by_keys):
        weights = _logits(query, key, bias, visible, part)
        weights.sub_(offset[part.queries].unsqueeze(-1)).exp_()
        if total is not None:
            weights.div_(total[part.queries].unsqueeze(-1))
        grads = grad_output[part.queries]
        if grad_value is not None:
            new = by_keys or part.is_first
            _put(grad_value, part.keys, weights.to(value.dtype).transpose(-1, -2), grads.to(value.dtype), new=new)
        if not (needs[0] or needs[1] or needs[3]):
            continue
        logits = product(grads, value[part.keys].transpose(-1, -2)).to(wide)
        logits.sub_(shift[part.queries].unsqueeze(-1)).mul_(weights)
        if grad_bias is not None:
            place = grad_bias[part.keys]
            place.copy_(logits.sum(-2)) if by_keys or part.is_first else place.add_(logits.sum(-2))
        logits = logits.to(narrow)
        if grad_query is not None:
            _put(grad_query, part.queries, logits, key[part.keys].to(narrow), new=not by_keys or part.is_first)
        if grad_key is not None:
            new = by_keys or part.is_first
            _put(grad_key, part.keys, logits.transpose(-1, -2), query[part.queries].to(narrow), new=new)
    if bias is not None and grad_bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return (
        None if grad_query is None else grad_query.to(query.dtype),
        None if grad_key is None else grad_key.to(key.dtype),
        None if grad_value is None else grad_value.to(value.dtype),
        grad_bias,
    )


def _normalised(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    *,
    by_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of the weights relative to it, and `grad_output . output`, of every query.

    From the very numbers that the backward pass computes: gradients that cancel, cancel to the last digit.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    top = torch.full(query.shape[:-1], torch.finfo(wide).min, dtype=wide, device=query.device)
    total, mean = torch.zeros_like(top), torch.zeros_like(top)
    for part in _tiles(query, key, by_keys=by_keys):
        logits, before = _logits(query, key, bias, visible, part), top[part.queries]
        highest = torch.maximum(before, logits.amax(-1))
        weights, decay = logits.sub_(highest.unsqueeze(-1)).exp_(), (before - highest).exp_()
        total[part.queries] = total[part.queries] * decay + weights.sum(-1)
        pairs = product(grad_output[part.queries], value[part.keys].transpose(-1, -2)).to(wide)
        mean[part.queries] = mean[part.queries] * decay + weights.mul_(pairs).sum(-1)
        top[part.queries] = highest
    total.masked_fill_(total == 0, 1.0)
    return top, total, mean.div_(total)


# -- tiles -----------------------------------------------------------------------------------------------------------


class _Tile:
    """Indices of a tile: some batch entries, all or some heads, and a stretch of the queries or of the keys."""

    def __init__(self, batch: slice, heads: slice, queries: slice, keys: slice, is_first: bool) -> None:
        self.is_first = is_first
        self.lead = (batch, heads)
        self.queries = (batch, heads, queries)
        self.keys = (batch, heads, keys)
        self.pairs = (batch, heads, queries, keys)


def _tiles(query: Tensor, key: Tensor, *, by_keys: bool) -> Iterator[_Tile]:
    """Tiles of at most so many logits (or of one query or key), cut along the keys or the queries, then the heads."""
    batch, heads, queries, keys = *query.shape[:3], key.shape[2]
    budget = _TILE.get(query.device.type, _LARGE_TILE)
    along, across = (keys, queries) if by_keys else (queries, keys)
    alone = min(along, _TILE_ALONE // across)
    if suits_onednn(query, alone * across * query.shape[-1]):
        steps = budget = alone  # products of one head at a time
    else:
        steps = max(1, min(along, max(64, budget // (across * min(heads, 4)))))
    per_head = min(heads, max(1, budget // (steps * across)))
    per_batch = min(batch, max(1, budget // (steps * across * per_head))) if per_head == heads else 1
    everything = slice(None)
    for b in range(0, batch, per_batch):
        for h in range(0, heads, per_head):
            for start in range(0, along, steps):
                cut = slice(start, start + steps)
                yield _Tile(
                    slice(b, b + per_batch),
                    slice(h, h + per_head),
                    everything if by_keys else cut,
                    cut if by_keys else everything,
                    is_first=start == 0,
                )


def _logits(query: Tensor, key: Tensor, bias: Tensor | None, visible: Tensor | None, part: _Tile) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = product(query[part.queries].to(wide), key[part.keys].to(wide).transpose(-1, -2))
    if bias is not None:
        logits += bias[part.keys].unsqueeze(-2)
    if visible is not None:
        logits.masked_fill_(~visible[part.pairs], float("-inf"))
    return logits


def _put(total: Tensor, place: tuple[slice, ...], left: Tensor, right: Tensor, *, new: bool) -> None:
    """Write a product to a place, or add it if another tile has written there."""
    target = total[place].flatten(0, 1)  # a view: a tile has all heads, or one batch entry
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if left.dtype != target.dtype or (left.shape[0] == 1 and suits_onednn(left, left.numel() * right.shape[-1])):
        part = product(left, right)
        target.copy_(part) if new else target.add_(part)
    else:
        torch.baddbmm(target, left, right, beta=0 if new else 1, out=target)


# -- large logits ----------------------------------------------------------------------------------------------------
# A logit is rounded by about `eps` times what it is summed from, and the sum may be formed differently in the two
# directions: then `exp(logit - lse)` is off by that much, and the weights of a query do not add up to one. Of
# ordinary numbers nothing of it is seen. Where products reach into the hundreds, the backward pass normalises anew.

# Of `|query| |key| + |bias|`.
_ORDINARY = 128.0


def _is_large(query: Tensor, key: Tensor, bias: Tensor | None) -> bool:
    """Whether logits `query . key + bias` may be so large that weights have to be normalised anew.

    Always, where looking would make a device wait. Cost: one pass over the inputs.
    """
    if query.device.type != "cpu":
        return True
    if not query.numel() or not key.numel():
        return False
    size = _longest(query) * _longest(key)
    if bias is not None and bias.numel():
        bias = _unexpanded(bias)
        size = size + bias.masked_fill(bias == float("-inf"), 0.0).abs().amax()
    return not bool(size <= _ORDINARY)


def _longest(x: Tensor) -> Tensor:
    """The length of the longest vector of the last dimension."""
    x = _unexpanded(x)
    return torch.linalg.vecdot(x, x).amax().to(torch.promote_types(x.dtype, torch.float32)).sqrt()


def _unexpanded(x: Tensor) -> Tensor:
    """`x` without repetitions in any dimension but the last."""
    for dim, stride in enumerate(x.stride()[:-1]):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x
