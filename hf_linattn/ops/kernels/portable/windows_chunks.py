"""`windows_chunks` in plain torch: two softmaxes and their merge, whose gradients follow from the joint log mass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...partial import Partial, merge
from .attend import attend_backward, attend_forward


class Inputs(NamedTuple):
    """The tensors of `windows_chunks_forward`."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    chunk_key: Tensor
    chunk_bias: Tensor
    chunk_value: Tensor
    hidden_from: Tensor
    hidden_to: Tensor

    def in_windows(self, is_causal: bool) -> Tensor | None:
        """`[groups, windows, queries, keys]`, the keys of its window that a query sees."""
        groups, windows, length, _ = self.query.shape
        keys = self.key.shape[2]
        seen = self.visible
        if is_causal:
            place = torch.arange(keys, device=self.key.device)
            past = place <= torch.arange(keys - length, keys, device=self.key.device)[:, None]
            seen = past if seen is None else seen & past
        return None if seen is None else seen.expand(groups, windows, length, keys)

    def chunks_seen(self) -> Tensor:
        """`[groups, 1, windows * queries, chunks]`, the chunks that a query reads."""
        chunk = torch.arange(self.chunk_key.shape[1], device=self.chunk_key.device)
        seen = (chunk < self.hidden_from[..., None]) | (chunk >= self.hidden_to[..., None])
        return seen.unsqueeze(2).expand(-1, -1, self.query.shape[2], -1).flatten(1, 2).unsqueeze(1)

    def chunks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and bias of the attention to chunks, with a dimension of one head."""
        query = self.query.flatten(1, 2).unsqueeze(1)
        return query, self.chunk_key.unsqueeze(1), self.chunk_value.unsqueeze(1), self.chunk_bias.unsqueeze(1)


def windows_chunks_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    chunk_key: Tensor,
    chunk_bias: Tensor,
    chunk_value: Tensor,
    hidden_from: Tensor,
    hidden_to: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output `[groups, windows, queries, head_dim]` and log mass. Arguments as in `windows_chunks`."""
    inputs = Inputs(query, key, value, visible, chunk_key, chunk_bias, chunk_value, hidden_from, hidden_to)
    shape = query.shape[1:3]
    near = Partial(*attend_forward(query, key, value, None, inputs.in_windows(is_causal)))
    far = attend_forward(*inputs.chunks(), inputs.chunks_seen())
    both = merge([near, Partial(far[0].squeeze(1).unflatten(1, shape), far[1].squeeze(1).unflatten(1, shape))])
    return both.output.contiguous(), both.log_mass.contiguous()


def windows_chunks_backward(
    grad_output: Tensor,
    grad_mass: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    chunk_key: Tensor,
    chunk_bias: Tensor,
    chunk_value: Tensor,
    hidden_from: Tensor,
    hidden_to: Tensor,
    output: Tensor,
    log_mass: Tensor,
    needs: list[bool],
    is_causal: bool,
) -> list[Tensor | None]:
    """Gradients of query, key, value, chunk_key, chunk_bias and chunk_value, where `needs` says so."""
    inputs = Inputs(query, key, value, visible, chunk_key, chunk_bias, chunk_value, hidden_from, hidden_to)
    results = (grad_output, grad_mass, output, log_mass)
    # Weights are relative to the joint mass, so each part's gradients are those of an attention with these results.
    seen = inputs.in_windows(is_causal)
    near = attend_backward(
        *results[:2], query, key, value, None, seen, *results[2:], [needs[0], needs[1], needs[2], False]
    )
    flat = [z.flatten(1, 2).unsqueeze(1) for z in results]
    far_query, far_key, far_value, far_bias = inputs.chunks()
    far = attend_backward(
        *flat[:2],
        far_query,
        far_key,
        far_value,
        far_bias,
        inputs.chunks_seen(),
        *flat[2:],
        [needs[0], needs[3], needs[5], needs[4]],
    )
    grad_query = None
    if near[0] is not None and far[0] is not None:
        grad_query = near[0] + far[0].squeeze(1).unflatten(1, query.shape[1:3])
    of_chunks = [None if z is None else z.squeeze(1) for z in far[1:]]
    return [grad_query, near[1], near[2], of_chunks[0], of_chunks[2], of_chunks[1]]
