"""EVA on short inputs, on a CPU: the same function in a few large products, with chunks made where they are read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.attend import attend
from ...kernels.backends import current_backend, runs_on_triton
from ...kernels.short_chunks import short_chunk_attention
from ...kernels.short_chunks.joined import Sizes
from ..ablation import ABLATED
from .chunks import Summariser
from .exclusive import longest_chunk
from .layout import ChunkOptions

# Most tokens of a short input; above, windows that each have all chunks beside them cost more than they save.
LONGEST = 1024


def short_chunk(query: Tensor, key: Tensor, value: Tensor, options: ChunkOptions) -> int | None:
    """Tokens of a chunk of an input without padding that is short; `None` for one that is not."""
    tokens, window = key.shape[2], options.window_size
    if (
        not window < tokens <= LONGEST
        or options.is_causal
        or options.overlap_side is not None
        or options.chunking != "exclusive"
        or query.device.type != "cpu"
        or query.shape != key.shape
        or key.shape != value.shape
        or ABLATED
        or torch.compiler.is_compiling()
        or runs_on_triton(current_backend(), query)
    ):
        return None
    chunk = options.chunk_size or longest_chunk(window, options.num_chunks, tokens)
    return chunk if chunk <= window else None


def short_eva(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk: int,
    window: int,
    summarise: Summariser,
) -> Tensor:
    """What all queries read of all tokens, `[batch, heads, tokens, head_dim]`."""
    root = summarise.root
    if chunk == 1 and summarise.key_map is None:  # every key for itself
        return attend(query * root**2, key, value).output
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    tokens = key.shape[1]
    missing = -tokens % window
    if missing:
        query, key, value = (F.pad(z, (0, 0, 0, 0, 0, missing)) for z in (query, key, value))

    def mean(x: Tensor) -> Tensor:
        """`[batch, heads, chunks, head_dim]`, scaled."""
        members = x.unflatten(1, (-1, chunk))
        if chunk == 1:
            found = members.squeeze(2)
        elif missing:
            number = (tokens - torch.arange(0, x.shape[1], chunk)).clamp_(1, chunk).to(x.dtype)
            found = members.sum(2) / number[:, None, None]
        else:
            found = members.mean(2)
        return found.transpose(1, 2) * root

    centre = mean(key)
    key_mean = summarise.mapped(centre, summarise.key_map)
    centre = proposal = centre.detach()
    if chunk > 1:
        query_mean = mean(query) if summarise.uses_queries else None
        proposal = summarise.proposal(query_mean, key_mean, centre)
    sizes = Sizes(tokens, window, chunk, summarise.weighting == "size", root)
    output = short_chunk_attention(query, key, value, key_mean, proposal, centre, sizes).output
    return (output[:, :tokens] if missing else output).transpose(1, 2)
