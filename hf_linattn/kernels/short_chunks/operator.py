"""Attention in a window and to chunks elsewhere, of short inputs: chunks are read where they are made."""

from __future__ import annotations

from torch import Tensor

from ..attention_state import AttentionState
from ..backends import current_backend, register_pair
from . import torch_kernel
from .joined import Sizes


def short_chunk_attention(
    query: Tensor, key: Tensor, value: Tensor, chunk_key: Tensor, proposal: Tensor, centre: Tensor, sizes: Sizes
) -> AttentionState:
    """What queries read from the keys of their window, and from all chunks outside it.

    A chunk's value is `sum_n softmax_n(proposal . y_n - |y_n|^2 / 2) v_n` over its members, with `y` the scaled keys
    relative to its centre.

    Args:
        query, key, value: `[batch, places, heads, head_dim]`, on the CPU; places are whole windows. Not scaled.
        chunk_key, proposal, centre: `[batch, heads, chunks, head_dim]`, scaled: where a chunk is read, its proposal
            relative to its centre, and the centre, a constant.
    Returns: output `[batch, places, heads, head_dim]` and log-sum-exp. Nothing that is of use for places without a
        token.
    Cost: O(places * (window + chunks) * head_dim); memory `windows * (window + chunks) * head_dim` of some heads.
    """
    backend = current_backend()
    return AttentionState(*_ShortChunks.apply(query, key, value, chunk_key, proposal, centre, *sizes, backend))


_ShortChunks = register_pair(
    "short_chunks(Tensor query, Tensor key, Tensor value, Tensor chunk_key, Tensor proposal, Tensor centre, int tokens,"
    " int window, int chunk, bool weighs_size, float root) -> (Tensor output, Tensor lse)",
    torch_kernel,
    record=torch_kernel.ShortChunkInputs,
    differentiable=(0, 1, 2, 3, 4),
)
