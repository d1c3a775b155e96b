"""Causal attention through slots in plain torch, piece by piece: features of keys and queries that share references.

A piece is as many neighbouring tokens as can share one reference `m_j` for every slot (`torch_kernel`): whole chunks,
or a part of one. References are the running maximum of the log-weights `c` of keys, so nothing overflows. They may be
those of keys that some queries of the piece do not see. Where this could make what they do see underflow
(`_safe_top`), the piece is cut in two; a piece of one token is always safe.

Sums over keys need their mass too. It is the sum of a value that is 1 for every key, one more column of the values;
what is added to log-weights is one more column of tokens and slots in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..slot_inputs import SlotInputs

# Columns of values are filled up with zeros to a multiple of this, for which products are faster.
_LANES = 16


class Memory:
    """Tensors that are used again for every segment: new memory costs as much as many of the products.

    Args: like: Has their device and precision.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._kept: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def empty(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name and shape, with whatever is in it."""
        place = self._kept.get((name, shape))
        if place is None:
            place = self._kept[name, shape] = self._like.new_empty(shape)
        return place

    def with_column(self, name: str, x: Tensor, column: Tensor | float, *, filled: bool = False) -> Tensor:
        """`x` with one more column and, if `filled`, some of zeros."""
        *lead, dim = x.shape
        place = self.empty(name, *lead, -(-(dim + 1) // _LANES) * _LANES)
        place[..., :dim] = x
        place[..., dim] = column
        if not filled:
            return place[..., : dim + 1]
        place[..., dim + 1 :] = 0.0
        return place

    def fresh(self) -> Memory:
        """Other memory."""
        return Memory(self._like)


class Maps:
    """The two linear maps from tokens to log-weights, of some groups: slots, and one more column for what is added."""

    def __init__(self, inputs: SlotInputs, memory: Memory) -> None:
        self.bias = inputs.query_slot_bias + inputs.key_slot_bias
        self.of_keys = memory.with_column("key slots", inputs.key_slots, 1.0)
        self.of_queries = memory.with_column("query slots", inputs.query_slots, 0.0)


class Piece:
    """Tokens whose features are relative to the same references.

    Args:
        inputs: Some groups. maps: Of these. where: The tokens of the piece, one chunk or some of the same length.
        logits: Log-weights of its keys without bias of the slots, `[groups, tokens, slots]`; overwritten.
        top: The references, `[groups, slots]`. before: Those of the tokens before.

    Attributes:
        keys, queries: Their features, at most 1, `[groups, tokens, slots]`. The weights of a query are
            `exp(query_top)` times the products of its features and those of keys.
        query_top: `[groups, tokens, 1]`.
        pairs: Products of the features in each chunk, 0 for later keys, `[groups * chunks, chunk, chunk]`.
        decay: What sums over earlier keys are multiplied with, `[groups, slots]`.
        memory: Free for what else is made of the piece.
    """

    def __init__(
        self,
        inputs: SlotInputs,
        maps: Maps,
        where: slice,
        chunk: int,
        logits: Tensor,
        top: Tensor,
        before: Tensor,
        memory: Memory,
    ) -> None:
        self.where, self.chunk, self.top, self.memory = where, chunk, top, memory
        self.decay = (before - top).exp_()
        self.keys = logits.sub_(top.unsqueeze(1)).exp_()
        # References are large where keys are long, and similar: what they have in common is added last, to the lse.
        common = top.amax(1, keepdim=True)
        maps.of_queries[..., -1] = (top - common).add_(maps.bias)
        self.queries = _logits("queries", inputs.query[:, where], 1.0, maps.of_queries, memory)
        query_top = self.queries.amax(-1, keepdim=True)
        self.queries.sub_(query_top).exp_()
        self.query_top = query_top.add_(common.unsqueeze(1))
        self.pairs = self.products("pairs", self.queries, self.keys)

    def joined(self, x: Tensor) -> Tensor:
        """`[groups, tokens, ...]` as `[groups * chunks, chunk, ...]`."""
        return x.view(-1, self.chunk, x.shape[-1])

    def chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[groups, tokens, ...]` as its chunks, `[groups, chunk, ...]`."""
        return x.unflatten(1, (-1, self.chunk)).unbind(1)

    def products(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Of the queries and keys of each chunk, 0 for later keys: `[groups * chunks, chunk, chunk]`."""
        left, right = self.joined(left), self.joined(right)
        place = self.memory.empty(name, left.shape[0], self.chunk, self.chunk)
        return torch.bmm(left, right.mT, out=place).tril_()


def pieces(
    inputs: SlotInputs, maps: Maps, where: slice, chunk: int, before: Tensor, memory: Memory
) -> Iterator[Piece]:
    """Tokens in as few pieces as is safe, given the references of the tokens before.

    Args: memory: For pieces of whole chunks and for one of what is left, not for parts of these.
    """
    middle = where.stop - (where.stop - where.start) % chunk
    for part in (slice(where.start, middle), slice(middle, where.stop)):
        size = part.stop - part.start
        if not size:
            continue
        logits = _logits("keys", inputs.key[:, part], inputs.key_bias[:, part], maps.of_keys, memory)
        for cut, top in safe_cuts(logits, before, chunk):
            tokens, some, place = part, logits, memory
            if cut.stop - cut.start < size:
                tokens = slice(part.start + cut.start, part.start + cut.stop)
                some, place = logits[:, cut].clone(memory_format=torch.contiguous_format), memory.fresh()
            yield Piece(inputs, maps, tokens, min(chunk, tokens.stop - tokens.start), some, top, before, place)
            before = top


def safe_cuts(logits: Tensor, top: Tensor, chunk: int, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Where to cut the tokens of log-weights `[groups, tokens, slots]`, and the references of each part.

    Args:
        top: The references before, `[groups, slots]`.
        chunk: A part that is longer has a multiple of so many tokens.
        start: Of the first token, added to the places of the cuts.
    """
    size = logits.shape[1]
    new_top = _safe_top(logits, top)
    if new_top is not None:
        yield slice(start, start + size), new_top
        return
    half = (size + 1) // 2
    if size > chunk:
        half = -(-half // chunk) * chunk
    for place, part in ((0, logits[:, :half]), (half, logits[:, half:])):
        for cut, new_top in safe_cuts(part, top, chunk, start + place):
            yield cut, new_top
            top = new_top


def _logits(name: str, tokens: Tensor, column: Tensor | float, slots: Tensor, memory: Memory) -> Tensor:
    tokens = memory.with_column("tokens", tokens, column)
    return torch.bmm(tokens, slots.mT, out=memory.empty(name, *tokens.shape[:2], slots.shape[1]))


def _safe_top(logits: Tensor, before: Tensor) -> Tensor | None:
    """The new reference of every slot, `[groups, slots]`; `None` if the tokens have to be cut.

    It is safe if nothing that a query sees can underflow because of the reference of a key that it does not see. A
    query sees the keys before these tokens and its own: the reference may not be far above both. e^-28 of the largest
    weight is below the rounding of float32; float64 has room to spare.
    """
    top = torch.maximum(logits.amax(1), before)
    room = -math.log(torch.finfo(logits.dtype).tiny) - 28
    if logits.shape[1] == 1 or bool((top - before).amax() <= room):
        return top
    lowest = logits.amin(1)
    if bool((lowest == float("-inf")).any()):  # padding does not count
        lowest = logits.masked_fill(logits == float("-inf"), float("inf")).amin(1)
    return top if bool((top - torch.maximum(lowest, before)).amax() <= room) else None
