"""Windows and chunks of short inputs under one softmax, forward and backward, for CPUs.

Forward the two are read by torch's flash kernel, from where they lie in memory. Backward the weights are computed again
by the kernel of windows and chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..window_chunks.torch_kernel import WindowChunkInputs, part_gradients
from .cutting import Sizes, places
from .summaries import Kept, Members, Summaries

# Chunks, from their members, the parameters and, in the backward pass, what was kept.
Summarise = Callable[..., Summaries]


def _members(tokens: Sequence[Tensor], sizes: Sizes) -> Members:
    batch, _, heads, dim = tokens[0].shape
    return Members(*(z.view(batch, -1, sizes.chunk, heads, dim) for z in tokens))


def read_forward(
    tokens: Sequence[Tensor], parameters: Sequence[Tensor], sizes: Sizes, summarise: Summarise
) -> tuple[Tensor, ...]:
    """Output `[batch, places, heads, head_dim]`, log-sum-exp, and what to keep of the summaries.

    Args:
        tokens: Queries, keys and values `[batch, places, heads, head_dim]`.
        parameters: `[heads, ...]`.
    """
    batch, length, heads, dim = tokens[0].shape
    window, scaling = sizes.window, sizes.scaling
    windows, fixed = length // window, places(sizes, tokens[0].dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    tokens = [z if z.stride(-1) == 1 else z.contiguous() for z in tokens]
    summaries = summarise(_members(tokens, sizes), fixed, parameters)
    query, key, value = (z.reshape(batch * windows, window, heads, dim).transpose(1, 2) for z in tokens)
    mask = fixed.near
    if mask is not None:
        mask = mask.repeat(batch, 1, 1, 1).expand(-1, heads, window, -1)
    near, near_lse = flash(query, key, value, attn_mask=mask, scale=scaling)
    chunk_key, chunk_value, rows = summaries.key.transpose(1, 2), summaries.value.transpose(1, 2), []
    for row in range(batch):  # those of one row have the same chunks
        mask = fixed.far if summaries.bias is None else fixed.far + summaries.bias[row].unsqueeze(1)
        rows.append(
            flash(
                query[row * windows : (row + 1) * windows],
                chunk_key[row : row + 1].expand(windows, -1, -1, -1),
                chunk_value[row : row + 1].expand(windows, -1, -1, -1),
                attn_mask=mask.expand(-1, heads, window, -1),
                scale=scaling,
            )
        )
    far, far_lse = rows[0] if batch == 1 else (torch.cat(parts) for parts in zip(*rows, strict=True))
    # Every window has a key, and there is a chunk outside of it.
    output = torch.lerp(near, far, torch.sigmoid(far_lse - near_lse).unsqueeze(-1))
    lse = torch.logaddexp(near_lse, far_lse)
    # In memory the results of the kernel have the order of tokens.
    output = output.transpose(1, 2).reshape(batch, length, heads, dim)
    return output, lse.transpose(1, 2).reshape(batch, length, heads), *summaries.kept


def read_backward(
    grads: AttentionState,
    results: Sequence[Tensor],
    tokens: Sequence[Tensor],
    parameters: Sequence[Tensor],
    sizes: Sizes,
    summarise: Summarise,
) -> list[Tensor | None]:
    """Gradients of the tokens and the parameters."""
    batch, length, heads, dim = tokens[0].shape
    window, fixed = sizes.window, places(sizes, tokens[0].dtype)
    windows = length // window
    summaries = summarise(_members(tokens, sizes), fixed, parameters, results[2:])
    count = summaries.key.shape[1]

    def by_head(x: Tensor) -> Tensor:
        """`[batch, places, heads, dim]` -> `[batch * heads, windows, window, dim]`."""
        return x.transpose(1, 2).reshape(batch * heads, windows, window, x.shape[-1])

    def of_chunks(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch * heads, count, dim)

    bias = fixed.log_weight
    if summaries.bias is not None:
        bias = bias + summaries.bias.reshape(batch * heads, count)
    scaled = torch.mul(tokens[0].transpose(1, 2), sizes.scaling, out=tokens[0].new_empty(batch, heads, length, dim))
    given = WindowChunkInputs(
        scaled.view(batch * heads, windows, window, dim),
        by_head(tokens[1]),
        by_head(tokens[2]),
        None,
        of_chunks(summaries.key),
        bias.expand(batch * heads, count),
        of_chunks(summaries.value),
        fixed.log_weight,
        fixed.log_weight,
    )
    upstream = AttentionState(by_head(grads.output), by_head(grads.lse.unsqueeze(-1)).squeeze(-1))
    had = by_head(results[0]), by_head(results[1].unsqueeze(-1)).squeeze(-1)
    has_bias = summaries.bias is not None
    needs = [True] * 4 + [has_bias, True]
    of_query, of_key, of_value, of_chunk_key, of_bias, of_chunk_value = part_gradients(
        upstream, given, had, needs, fixed.seen, fixed.read
    )
    of_query.mul_(sizes.scaling)  # type: ignore[union-attr]

    def of_tokens(x: Tensor) -> Tensor:
        return x.view(batch, heads, length, dim).transpose(1, 2)

    def of_summaries(x: Tensor) -> Tensor:
        return x.view(batch, heads, count, dim).transpose(1, 2)

    found = [of_tokens(x) for x in (of_query, of_key, of_value)]  # type: ignore[arg-type]
    of_parameters = summaries.backward(
        of_summaries(of_chunk_key),  # type: ignore[arg-type]
        of_summaries(of_chunk_value),  # type: ignore[arg-type]
        of_bias.view(batch, heads, count) if has_bias else None,  # type: ignore[arg-type, union-attr]
        _members(found, sizes),
    )
    return [*(z.contiguous() for z in found), *of_parameters]
