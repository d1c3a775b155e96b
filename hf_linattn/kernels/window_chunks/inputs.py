"""What goes into attention in a window and to summaries of chunks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class WindowChunkInputs(NamedTuple):
    """Tensors of `window_chunk_attention`, all with their dimension of groups."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    chunk_key: Tensor
    chunk_bias: Tensor
    chunk_value: Tensor
    hidden_from: Tensor
    hidden_to: Tensor
