"""The kernels of `operator.py` in plain torch, for CPUs.

Forward, windows and chunks are read by torch's flash kernel, from where they lie in memory. Backward their weights are
computed again by the kernel of windows and chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..window_chunks.torch_kernel import WindowChunkInputs, part_gradients
from .cutting import Places, Sizes, places
from .sorts import AllSummaries, Summarise
from .summaries import ControlVariates, Pooled

_HALVES = (torch.float16, torch.bfloat16)
# Logits of a part of the backward pass.
_PART = 1 << 20


class VariateInputs(NamedTuple):
    """Tensors of `short_variates`."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_adapter: Tensor | None
    key_adapter: Tensor | None


class PooledInputs(NamedTuple):
    """Tensors of `short_pooled`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_pooling: Tensor
    value_pooling: Tensor
    key_adapter: Tensor
    query_adapter: Tensor
    far_offset: Tensor
    far_slope: Tensor
    key_slope: Tensor


def short_variates_forward(inputs: VariateInputs, proposals: str, *sizes: Any) -> tuple[Tensor, ...]:
    """Output and log-sum-exp, as `short_variates` describes them, and what is kept of the chunks."""
    return _forward(inputs, Sizes(*sizes), _variates(proposals, sizes))


def short_variates_backward(
    grads: AttentionState,
    inputs: VariateInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    proposals: str,
    *sizes: Any,
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    return _backward(grads, inputs, results, needs, Sizes(*sizes), _variates(proposals, sizes))


def short_pooled_forward(inputs: PooledInputs, *sizes: Any) -> tuple[Tensor, ...]:
    """Output and log-sum-exp, as `short_pooled` describes them, and what is kept of the chunks."""
    return _forward(inputs, Sizes(*sizes), partial(Pooled, scaling=sizes[-1]))


def short_pooled_backward(
    grads: AttentionState, inputs: PooledInputs, results: Sequence[Tensor], needs: Sequence[bool], *sizes: Any
) -> list[Tensor | None]:
    """Gradients of the inputs, where `needs` says so."""
    return _backward(grads, inputs, results, needs, Sizes(*sizes), partial(Pooled, scaling=sizes[-1]))


def _variates(proposals: str, sizes: Sequence[Any]) -> Callable[..., ControlVariates]:
    return partial(ControlVariates, proposals=proposals, scaling=sizes[-1])


def _forward(inputs: Sequence[Any], sizes: Sizes, summarise: Summarise) -> tuple[Tensor, ...]:
    parts = [_read_forward(*part, sizes, summarise) for part in _parts(inputs)]
    output, *rest = parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]
    return output.to(inputs[0].dtype), *rest


def _backward(
    grads: AttentionState,
    inputs: Sequence[Any],
    results: Sequence[Tensor],
    needs: Sequence[bool],
    sizes: Sizes,
    summarise: Summarise,
) -> list[Tensor | None]:
    parts = _parts(inputs)
    wide = [z.float() if z.dtype in _HALVES else z for z in (*grads, *results)]
    some = zip(*(z.chunk(len(parts)) for z in wide), strict=True)
    found = [
        _read_backward(AttentionState(*given[:2]), given[2:], *part, sizes, summarise)
        for part, given in zip(parts, some, strict=True)
    ]
    grads_of: list[Tensor | None] = []
    for place, (like, needed, each) in enumerate(zip(inputs, needs, zip(*found, strict=True), strict=True)):
        if not needed:
            grads_of.append(None)
        elif place < 3:
            grads_of.append((each[0] if len(each) == 1 else torch.cat(each)).to(like.dtype))
        else:
            grads_of.append(torch.stack(each).to(like.dtype))
    return grads_of


def _parts(inputs: Sequence[Any]) -> list[tuple[Sequence[Tensor], list[Any]]]:
    """Queries, keys and values, and their parameters, in float32 or wider. Under `vmap` parts of the batch may have
    different ones."""
    if inputs[0].dtype in _HALVES:
        inputs = [None if z is None else z.float() for z in inputs]
    number = next((len(z) for z in inputs[3:] if z is not None), 1)
    if number == 1:
        return [(inputs[:3], [None if z is None else z[0] for z in inputs[3:]])]
    tokens = zip(*(z.chunk(number) for z in inputs[:3]), strict=True)
    return [(each, [None if z is None else z[i] for z in inputs[3:]]) for i, each in enumerate(tokens)]


def _summaries(
    tokens: Sequence[Tensor],
    fixed: Places,
    parameters: Sequence[Tensor],
    summarise: Summarise,
    kept: Sequence[Tensor] | None = None,
) -> Any:
    if len(fixed.sorts) == 1:
        return summarise(tokens, fixed.sorts[0], parameters, kept)
    return AllSummaries(tokens, fixed, parameters, summarise, kept)


def _read_forward(
    tokens: Sequence[Tensor], parameters: Sequence[Tensor], sizes: Sizes, summarise: Summarise
) -> tuple[Tensor, ...]:
    """Output `[batch, places, heads, head_dim]`, log-sum-exp, and what to keep of the summaries.

    Args:
        tokens: Queries, keys and values `[batch, places, heads, head_dim]`.
        parameters: `[heads, ...]`.
    """
    batch, length, heads, dim = tokens[0].shape
    window, scaling = sizes.window, sizes.scaling
    windows, fixed = length // window, places(sizes, length, tokens[0].dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    tokens = [z if z.stride(-1) == 1 else z.contiguous() for z in tokens]
    summaries = _summaries(tokens, fixed, parameters, summarise)
    query, key, value = [z.reshape(batch * windows, window, heads, dim).transpose(1, 2) for z in tokens]
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


def _read_backward(
    grads: AttentionState,
    results: Sequence[Tensor],
    tokens: Sequence[Tensor],
    parameters: Sequence[Tensor],
    sizes: Sizes,
    summarise: Summarise,
) -> list[Tensor | None]:
    """Gradients of the tokens and the parameters."""
    batch, length, heads, dim = tokens[0].shape
    window, fixed = sizes.window, places(sizes, length, tokens[0].dtype)
    windows = length // window
    summaries = _summaries(tokens, fixed, parameters, summarise, results[2:])
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
        fixed.read,
        fixed.read,
    )
    upstream = AttentionState(by_head(grads.output), by_head(grads.lse.unsqueeze(-1)).squeeze(-1))
    had = by_head(results[0]), by_head(results[1].unsqueeze(-1)).squeeze(-1)
    has_bias = summaries.bias is not None
    needs = [True] * 4 + [has_bias, True]
    step = max(1, _PART // (length * (window + count)))
    parts = []
    for start in range(0, batch * heads, step):
        some = slice(start, start + step)
        of_some = AttentionState(*(z[some] for z in upstream)), given.part(some), [z[some] for z in had]
        parts.append(part_gradients(*of_some, needs, fixed.seen, fixed.read))
    of_query, of_key, of_value, of_chunk_key, of_bias, of_chunk_value = (
        each[0] if len(each) == 1 or each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)
    )
    of_query.mul_(sizes.scaling)

    def of_tokens(x: Tensor) -> Tensor:
        return x.view(batch, heads, length, dim).transpose(1, 2)

    def of_summaries(x: Tensor) -> Tensor:
        return x.view(batch, heads, count, dim).transpose(1, 2)

    found = [of_tokens(x) for x in (of_query, of_key, of_value)]
    of_parameters = summaries.backward(
        of_summaries(of_chunk_key),
        of_summaries(of_chunk_value),
        of_bias.view(batch, heads, count) if has_bias else None,
        found,
    )
    return [*(z.contiguous() for z in found), *of_parameters]
