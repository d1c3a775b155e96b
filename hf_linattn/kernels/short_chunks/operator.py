"""EVA of short inputs on a CPU: windows, and chunks that are made where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..backends import current_backend
from ..operators import register_pair
from . import native_kernel, torch_kernel
from .cutting import Sizes


def short_variates(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_adapter: Tensor | None,
    key_adapter: Tensor | None,
    proposals: str,
    sizes: Sizes,
) -> AttentionState:
    """What queries read from the keys of their window, and from all chunks outside it, which are control variates.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]` on the CPU, global tokens first. Not scaled. Tokens that
            are not real (`lengths` of `sizes`) are finite.
        query_adapter, key_adapter: `[heads, head_dim, head_dim]`, residual maps of mean queries and keys.
        proposals: As in `eva_attention`.
    Returns: output `[batch, heads, tokens, head_dim]` and log-sum-exp. Nothing that is of use for tokens that are not
        real.
    Cost: O(tokens * (window + chunks) * head_dim) time, O(tokens * (head_dim + chunks)) memory.
    """
    arguments = (query, key, value, query_adapter, key_adapter, proposals, *sizes, current_backend())
    return AttentionState(*_variates(*arguments)[:2])


def short_pooled(query: Tensor, key: Tensor, value: Tensor, maps: Sequence[Tensor], sizes: Sizes) -> AttentionState:
    """The same with learned chunks.

    Args: maps: `[heads, ...]` each, the tensors of a `LearnedSummariser` in their order.
    """
    arguments = (query, key, value, *maps, *sizes, current_backend())
    return AttentionState(*_pooled(*arguments)[:2])


def _kept(key: Tensor, sizes: Sizes, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Like what is kept of control variates (`summaries.py`); C keeps nothing."""
    batch, heads, length, dim = key.shape
    dtype = key.dtype
    key = key.new_empty(0, dtype=torch.promote_types(key.dtype, torch.float32))
    if sizes.lengths or (backend != "torch" and native_kernel.computes(dtype, sizes)):
        return key, torch.empty_like(key), torch.empty_like(key)
    places = sizes.count(length - sizes.num_global)
    chunks = key.new_empty(batch, sum(places // size for size in sizes.members), heads, dim)
    weight = key.new_empty(batch, places * sum(size > 1 for size in sizes.members), heads)
    return chunks, torch.empty_like(chunks), weight


def _kept_weight(*arguments: Any) -> tuple[Tensor, ...]:
    return _kept(arguments[1], Sizes.of(arguments[6:-1]), arguments[-1])


def _kept_keys(*arguments: Any) -> tuple[Tensor, ...]:
    chunks, others, _ = _kept(arguments[1], Sizes.of(arguments[10:-1]), arguments[-1])
    return chunks, others, torch.empty_like(chunks)


_TOKENS = "Tensor query, Tensor key, Tensor value"
_SIZES = (
    "int window, int chunk, bool weighs_size, float scaling, int height, int width, int num_global, int[] lengths,"
    " int[] chunks"
)
_RESULTS = "Tensor output, Tensor lse, Tensor chunk_key, Tensor chunk_value"
_variates = register_pair(
    f"short_variates({_TOKENS}, Tensor? query_adapter, Tensor? key_adapter, str proposals, {_SIZES})"
    f" -> ({_RESULTS}, Tensor weight)",
    torch_kernel,
    compiled=native_kernel,
    record=torch_kernel.VariateInputs,
    kept=_kept_weight,
    heads_first=3,
    takes_no_grad_lse=True,
)
_pooled = register_pair(
    f"short_pooled({_TOKENS}, Tensor key_pooling, Tensor value_pooling, Tensor key_adapter, Tensor query_adapter,"
    f" Tensor far_offset, Tensor far_slope, Tensor key_slope, {_SIZES}) -> ({_RESULTS}, Tensor pooled)",
    torch_kernel,
    compiled=native_kernel,
    record=torch_kernel.PooledInputs,
    kept=_kept_keys,
    heads_first=3,
    takes_no_grad_lse=True,
)
