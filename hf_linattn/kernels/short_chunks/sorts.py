"""Summaries of more than one length: chunks, and the windows in those chunks that are read one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cutting import Sort
from .summaries import Summaries

# Summaries, from tokens, the sort of summary, the parameters and, in the backward pass, what was kept.
Summarise = Callable[..., Summaries]


class AllSummaries:
    """Summaries of all sorts beside each other."""

    def __init__(
        self,
        tokens: Sequence[Tensor],
        sorts: Sequence[Sort],
        parameters: Sequence[Tensor],
        summarise: Summarise,
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        counts = [tokens[0].shape[1] // sort.length for sort in sorts]
        self.counts = counts
        given: list[Any] = [None] * len(sorts)
        if kept is not None:
            last = counts
            if kept[2].ndim == 3:  # weights of members
                last = [tokens[0].shape[1] * (sort.length > 1) for sort in sorts]
            given = list(zip(kept[0].split(counts, 1), kept[1].split(counts, 1), kept[2].split(last, 1), strict=True))
            given = [tuple(z.contiguous() for z in each) for each in given]
        self.parts = [summarise(tokens, sort, parameters, had) for sort, had in zip(sorts, given, strict=True)]
        self.key = torch.cat([part.key for part in self.parts], 2)
        self.value = torch.cat([part.value for part in self.parts], 2)
        self.bias = None
        if self.parts[0].bias is not None:
            self.bias = torch.cat([part.bias for part in self.parts], -1)  # type: ignore[misc]

    @property
    def kept(self) -> Sequence[Tensor]:
        return [torch.cat(each, 1) for each in zip(*(part.kept for part in self.parts), strict=True)]

    def backward(
        self, of_key: Tensor, of_value: Tensor, of_bias: Tensor | None, grads: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Add to the gradients of the tokens, `[batch, places, heads, dim]`; returns those of the parameters."""
        of_keys, of_values = of_key.split(self.counts, 2), of_value.split(self.counts, 2)
        of_biases = [None] * len(of_keys) if of_bias is None else of_bias.split(self.counts, -1)
        found = [
            part.backward(key, value, bias, grads)
            for part, key, value, bias in zip(self.parts, of_keys, of_values, of_biases, strict=True)
        ]
        return [
            one if other is None else other if one is None else one + other for one, other in zip(*found, strict=True)
        ]
