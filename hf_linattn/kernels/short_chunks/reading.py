"""Windows and chunks of short inputs under one softmax, forward and backward, for CPUs.

Forward the two are read by torch's flash kernel, from where they lie in memory. Backward the weights are computed again
by the kernel of windows and chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..window_chunks.torch_kernel import WindowChunkInputs, part_gradients
from .cutting import Places, Sizes, places
from .summaries import Members, Summaries

# Chunks, from their members, what sort of chunks they are, the parameters and, in the backward pass, what was kept.
Summarise = Callable[..., Summaries]
# Logits of a part of the backward pass.
_PART = 1 << 20


class _AllSummaries:
    """Summaries of all sorts beside each other."""

    def __init__(
        self,
        tokens: Sequence[Tensor],
        places: Places,
        parameters: Sequence[Tensor],
        summarise: Summarise,
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        sorts = places.sorts
        if len(sorts) == 1:
            self.members, self.counts = [_members(tokens, sorts[0].length)], []
            part = summarise(self.members[0], sorts[0], parameters, kept)
            self.parts, self.key, self.value, self.bias = [part], part.key, part.value, part.bias
            return
        counts = [tokens[0].shape[1] // sort.length for sort in sorts]
        self.members, self.counts = [_members(tokens, sort.length) for sort in sorts], counts
        given: list[Any] = [None] * len(sorts)
        if kept is not None:
            last = [kept[2].shape[1] * count // sum(counts) for count in counts]
            if kept[2].ndim == 3:  # weights of members
                last = [tokens[0].shape[1] * (sort.length > 1) for sort in sorts]
            given = list(zip(kept[0].split(counts, 1), kept[1].split(counts, 1), kept[2].split(last, 1), strict=True))
        self.parts = [
            summarise(members, sort, parameters, had)
            for members, sort, had in zip(self.members, sorts, given, strict=True)
        ]
        self.key = torch.cat([part.key for part in self.parts], 1)
        self.value = torch.cat([part.value for part in self.parts], 1)
        self.bias = None
        if self.parts[0].bias is not None:
            self.bias = torch.cat([part.bias for part in self.parts], -1)  # type: ignore[misc]

    @property
    def kept(self) -> Sequence[Tensor]:
        if len(self.parts) == 1:
            return self.parts[0].kept
        return [torch.cat(each, 1) for each in zip(*(part.kept for part in self.parts), strict=True)]

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Add to the gradients of the tokens, `[batch, places, heads, dim]`; returns those of the parameters."""
        if len(self.parts) == 1:
            return self.parts[0].backward(of_key, of_value, of_bias, _members(grads, self.members[0].key.shape[2]))
        of_keys, of_values = of_key.split(self.counts, 1), of_value.split(self.counts, 1)
        of_biases = [None] * len(of_keys) if of_bias is None else of_bias.split(self.counts, -1)
        found = [
            part.backward(*of, _members(grads, members.key.shape[2]))
            for part, members, *of in zip(self.parts, self.members, of_keys, of_values, of_biases, strict=True)
        ]
        return [
            one if other is None else other if one is None else one + other for one, other in zip(*found, strict=True)
        ]


def _members(tokens: Sequence[Tensor], length: int) -> Members:
    batch, _, heads, dim = tokens[0].shape
    return Members(*[z.view(batch, -1, length, heads, dim) for z in tokens])


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
    windows, fixed = length // window, places(sizes, length, tokens[0].dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    tokens = [z if z.stride(-1) == 1 else z.contiguous() for z in tokens]
    summaries = _AllSummaries(tokens, fixed, parameters, summarise)
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
    window, fixed = sizes.window, places(sizes, length, tokens[0].dtype)
    windows = length // window
    summaries = _AllSummaries(tokens, fixed, parameters, summarise, results[2:])
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
        found,
    )
    return [*(z.contiguous() for z in found), *of_parameters]
