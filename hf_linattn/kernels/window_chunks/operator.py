"""Exact attention in a window and to summaries of chunks elsewhere, under one softmax: what EVA computes."""

from __future__ import annotations

from torch import Tensor

from ...errors import InputError
from ..attention_state import AttentionState
from ..backends import current_backend
from ..operators import register_pair
from . import torch_kernel


def window_chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    is_causal: bool,
    chunk_key: Tensor,
    chunk_bias: Tensor,
    chunk_value: Tensor,
    hidden_from: Tensor,
    hidden_to: Tensor,
) -> AttentionState:
    """What queries read from the keys of their window and from all chunks but a range that may depend on the window.

    Args:
        query: `[groups, windows, queries, dim]`.
        key: `[groups, windows, keys, dim]`. value: `[groups, windows, keys, head_dim]`.
        visible: Broadcasts to `[groups, windows, queries, keys]`; False hides a key from a query.
        is_causal: Queries are the last ones of the keys, and see none after them.
        chunk_key: `[groups, chunks, dim]`. chunk_value: `[groups, chunks, head_dim]`.
        chunk_bias: `[groups, chunks]`, `-inf` for a chunk that nothing reads.
        hidden_from, hidden_to: `[windows]` or `[groups, windows]`, integers. Window w does not read the chunks
            `hidden_from[w] <= c < hidden_to[w]`.
    Returns: output `[groups, windows, queries, head_dim]` and its log-sum-exp; 0 and `-inf` where nothing is visible.
    Raises: InputError if a causal window has fewer keys than queries.
    Cost: O(queries * (keys + chunks) * head_dim) per window; memory that of inputs and results.
    """
    if is_causal and key.shape[2] < query.shape[2]:
        raise InputError(
            f"A causal window needs at least as many keys as queries; got {key.shape[2]} and {query.shape[2]}."
        )
    groups, windows, length, _ = query.shape
    if visible is not None:
        visible = visible.expand(groups, windows, length, key.shape[2])
    hidden_from, hidden_to = hidden_from.expand(groups, windows), hidden_to.expand(groups, windows)
    chunks = (chunk_key, chunk_bias, chunk_value, hidden_from, hidden_to)
    return AttentionState(*_window_chunks(query, key, value, visible, *chunks, is_causal, current_backend()))


_window_chunks = register_pair(
    "window_chunks(Tensor query, Tensor key, Tensor value, Tensor? visible, Tensor chunk_key, Tensor chunk_bias,"
    " Tensor chunk_value, Tensor hidden_from, Tensor hidden_to, bool is_causal) -> (Tensor output, Tensor lse)",
    torch_kernel,
    record=torch_kernel.WindowChunkInputs,
    differentiable=(0, 1, 2, 4, 5, 6),
)
