"""Exact attention for short inputs: where it costs no more than an estimate, it is computed.

Two cases. All tokens of a row that come after its global ones fit into one window: then every kind is softmax
attention (`in_one_window`). And `exact_below`, an option of the layers: a bidirectional row of at most so many real
tokens is softmax attention, and in a causal row so are its first queries (`with_exact_rows`). Both are decided from
shapes, or by an operation on tensors: no value is looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .ablation import ABLATED
from .padding import real_tokens_first, reorder_tokens

# What an attention function gives where exact attention is its result: whoever has checked its arguments computes that
# from them as they came (`inputs.checked_attention`).
ONE_WINDOW: Any = None


def in_one_window(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    *,
    window_size: int,
    overlap_window: bool = False,
    is_causal: bool = False,
    num_global_tokens: int = 0,
    grid: tuple[int, int] | None = None,
) -> bool:
    """Whether the shapes say that every query sees every key exactly (causal: every key up to itself).

    False also for what is refused further on (cross-attention, a grid that does not fit, global tokens of a causal
    layer), for a grid with a mask, which has to be looked at, and while parts of attention are taken away.

    Args:
        query, key: `[batch, heads, tokens, head_dim]`. The others as in `favor_attention`.
    """
    queries, keys = query.shape[2], key.shape[2]
    if ABLATED:
        return False
    if is_causal:
        # A window that overlaps has the whole block before it.
        places = 2 * window_size if overlap_window else window_size
        return queries <= keys <= places and not num_global_tokens and grid is None
    if queries != keys:
        return False
    if grid is None:
        return keys - num_global_tokens <= window_size
    fits = grid[0] <= window_size and grid[1] <= window_size
    return fits and key_mask is None and keys - num_global_tokens == grid[0] * grid[1] and not overlap_window


def exact_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    scaling: float,
    is_causal: bool = False,
    real_first: bool = False,
) -> Tensor:
    """Softmax attention between the tokens of one sequence, by `scaled_dot_product_attention`.

    Differs from it: padding that is inf or NaN reaches neither values nor gradients, padded queries give 0, and fewer
    queries than keys (causal) are the last ones.

    Args:
        query: `[batch, heads, queries, head_dim]`, in the causal form at most as many as keys, otherwise as many.
        key, value: `[batch, heads, keys, head_dim]`. key_mask: `[batch, keys]` bool, True where a token is real.
        scaling: Factor of the dot product.
        real_first: The real tokens of a row come first, padding is 0, and nobody reads what padded queries give: there
            is less to do.
    Returns: `[batch, heads, queries, head_dim]`, computed in the dtype of the three and given in that of `query`.
    Cost: O(queries * keys * head_dim); with a mask the causal form also takes O(batch * queries * keys) memory.
    """
    queries, keys = query.shape[2], key.shape[2]
    if key_mask is None or (real_first and is_causal and queries == keys):
        if is_causal and 1 < queries < keys:
            return masked_softmax(query, key, value, _earlier(queries, keys, query.device), scaling=scaling)
        return masked_softmax(query, key, value, None, scaling=scaling, is_causal=is_causal and queries == keys)
    if real_first and not is_causal:
        return masked_softmax(query, key, value, _visible(key_mask, queries, is_causal=False), scaling=scaling)
    # Whatever stands in the padding would come back through a weight of 0, or through a gradient.
    real = key_mask[:, None, :, None]
    key, value = torch.where(real, key, 0.0), torch.where(real, value, 0.0)
    real = real if queries == keys else real[:, :, keys - queries :]
    if torch.is_grad_enabled():  # of queries through a gradient alone
        query = torch.where(real, query, 0.0)
    visible = _visible(key_mask, queries, is_causal=is_causal)
    return torch.where(real, masked_softmax(query, key, value, visible, scaling=scaling), 0.0)


def masked_softmax(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, *, scaling: float, is_causal: bool = False
) -> Tensor:
    """`scaled_dot_product_attention` without autocast, in the dtype of the arguments; given in that of `query`.

    Args:
        visible: Bool, broadcast to `[batch, heads, queries, keys]`; `None` for all.
    """
    dtype = query.dtype
    if not dtype == key.dtype == value.dtype:
        wide = torch.promote_types(torch.promote_types(dtype, key.dtype), value.dtype)
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return masked_softmax(query, key, value, visible, scaling=scaling, is_causal=is_causal).to(dtype)
    output = F.scaled_dot_product_attention(query, key, value, visible, is_causal=is_causal, scale=scaling)
    return output if output.dtype == dtype else output.to(dtype)


def _earlier(queries: int, keys: int, device: torch.device) -> Tensor:
    """`[queries, keys]` bool: the keys up to each query, the last of which has the place of the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _visible(key_mask: Tensor, queries: int, *, is_causal: bool) -> Tensor:
    """`[batch, 1, queries or 1, keys]` bool. A query without any real key reads zeros in place of nothing: kernels
    differ in what they make of nothing."""
    if not is_causal:
        return (key_mask | ~key_mask.any(-1, keepdim=True))[:, None, None]
    keys = key_mask.shape[1]
    earlier = _earlier(queries, keys, key_mask.device)
    return ((earlier & key_mask[:, None]) | earlier.triu(keys - queries))[:, None]


def with_exact_rows(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *,
    scaling: float,
    exact_below: int,
    is_causal: bool,
    real_first: bool = False,
) -> Tensor:
    """An estimate of attention, with softmax attention in its place where a row is short.

    Bidirectional: in rows of at most `exact_below` real tokens. Causal: for the first `exact_below` real queries.

    Args:
        output: The estimate, `[batch, heads, queries, head_dim]`. The others as in `exact_softmax`.
        exact_below: At least 1, and less than there are keys.
    Returns: As `output`.
    Raises: InputError for queries and keys of different sequences.
    Cost: O(batch * exact_below ** 2 * head_dim), whatever the number of keys.
    """
    queries, keys = query.shape[2], key.shape[2]
    if queries != keys and not (is_causal and queries < keys):
        raise InputError(
            f"exact_below={exact_below} needs queries and keys of the same tokens; got {queries} queries and {keys}"
            " keys. Set exact_below=0."
        )
    if key_mask is None or (real_first and is_causal and queries == keys):
        count = exact_below - (keys - queries) if is_causal else 0
        if count <= 0:
            return output
        first = (query[:, :, :count], key[:, :, :exact_below], value[:, :, :exact_below])
        exact = exact_softmax(*first, scaling=scaling, is_causal=True)
        return torch.cat([exact, output[:, :, count:]], dim=2)
    if queries != keys:
        query = F.pad(query, (0, 0, keys - queries, 0))
    if real_first and not is_causal:
        real = key_mask[:, :exact_below]
        first = (query[:, :, :exact_below], key[:, :, :exact_below], value[:, :, :exact_below])
        exact = exact_softmax(*first, real, scaling=scaling, real_first=True)
        # A row has a token in the place after, or it is short.
        short = ~key_mask[:, exact_below, None, None, None]
        return torch.cat([torch.where(short, exact, output[:, :, :exact_below]), output[:, :, exact_below:]], dim=2)
    position = key_mask.long().cumsum(-1) - 1
    short = position < exact_below if is_causal else position[:, -1:] < exact_below
    order, real = real_tokens_first(key_mask)
    order, real = order[:, :exact_below], real[:, :exact_below]
    first = (reorder_tokens(query, order, real), reorder_tokens(key, order, real), reorder_tokens(value, order, real))
    # Causal: no real token comes after padding.
    exact = exact_softmax(*first, None if is_causal else real, scaling=scaling, is_causal=is_causal)
    place, short = position.clamp(0, exact_below - 1), short & key_mask
    if queries != keys:
        place, short = place[:, keys - queries :], short[:, keys - queries :]
    exact = exact.gather(2, place[:, None, :, None].expand(-1, exact.shape[1], -1, exact.shape[-1]))
    return torch.where(short[:, None, :, None], exact, output)
