"""Rows of similar length, taken out of a batch once per model: of packed sequences, and of padded batches.

A batch `[batch, tokens]` may hold several sequences in a row (packed) or fewer tokens than places (padded). Attention
is computed row by row anyway, so its sequences are cut out and put into groups, each a padded batch of its own that
wastes little: the work is that of the sequences. Real tokens stand first in a group, so nothing has to be moved there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .row_partition import partition, parts

# What a further group costs beside its tokens, in tokens: on a CPU some hundred calls of small operators, on a GPU the
# launches of kernels that have little to do (experiments/packed_time.py).
_GROUP_COST = {"cpu": 512, "cuda": 16384}
_STARTS = "cu_seqlens must start at 0, never fall and end at the number of tokens"


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Sequences of similar length, one a row, real tokens first.

    Args:
        index: `[rows, tokens]` int64, the number of every token among the `batch * tokens` of the batch. Of padding
            that of some token; `RowGroups.split` has 0 there.
        real: `[rows, tokens]` bool, True where a token is real; `None` if all are.
        sequences: `[rows]` int64, the number of every row among the sequences of the batch.
        is_exact: Whether all rows have at most `exact_length` tokens.
        shortest: Every row has at least so many tokens, as far as is known.
    """

    index: Tensor
    real: Tensor | None
    sequences: Tensor
    is_exact: bool = False
    shortest: int = 0


class _Places(NamedTuple):
    """Where rows are taken from. numbers: `[n]` int64. empty: which are 0 instead, as numbers, or as `[n]` bool."""

    numbers: Tensor
    empty: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """`x` `[m, size]` as `[n, size]`."""
        taken = x.index_select(0, self.numbers)
        if self.empty is None:
            return taken
        if self.empty.dtype == torch.bool:
            return taken.masked_fill(self.empty[:, None], 0.0)
        return taken.index_fill_(0, self.empty, 0.0)  # touches the padding alone


class _Take(torch.autograd.Function):
    """Rows of a matrix, each at most once; its gradient takes them back, where torch would add them up one by one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, index: Tensor, empty: Tensor | None, back_index: Tensor, back_empty: Tensor | None
    ) -> Tensor:
        return _Places(index, empty).of(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Places(*ctx.saved_tensors).of(grad), None, None, None, None


@dataclass(frozen=True, eq=False)
class RowGroups:
    """The sequences of a batch in groups.

    Args:
        groups: At least one; no token is in two of them, nor twice in one.
        place: `[batch * tokens]` int64, where a token stands among the places of all groups, -1 if in none.
        shape: `(batch, tokens)`.
        num_sequences: Of the batch, those without tokens included.
        is_whole: Whether the one group has all tokens in the order of the batch, as with sequences of one length.
    """

    groups: tuple[RowGroup, ...]
    place: Tensor
    shape: tuple[int, int]
    num_sequences: int
    is_whole: bool
    _into: _Places  # the groups, from the batch
    _back: _Places  # the batch, from the groups

    def split(self, x: Tensor) -> list[Tensor]:
        """`x` `[batch, heads, tokens, dim]` as a tensor `[rows, heads, tokens of a row, dim]` a group; padding is 0.

        Cheap where the heads of a token lie next to each other, as projections leave them.
        Raises: InputError for another batch than the groups are of.
        """
        batch, heads, tokens, dim = x.shape
        if (batch, tokens) != self.shape:
            raise InputError(
                f"These rows are those of a batch {self.shape} (batch, tokens); got {batch} rows of {tokens} tokens."
            )
        taken = x.transpose(1, 2).reshape(batch * tokens, heads * dim)
        if not self.is_whole:
            taken = _Take.apply(taken, *self._into, *self._back)
        sizes = [group.index.shape for group in self.groups]
        parts = taken.split([rows * length for rows, length in sizes])
        return [part.view(*size, heads, dim).transpose(1, 2) for part, size in zip(parts, sizes, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors as `split` makes them, one a group, as `[batch, heads, tokens, dim]`; 0 where no group has a token.

        Its `[batch, tokens, heads, dim]` is contiguous.
        """
        heads, dim = parts[0].shape[1], parts[0].shape[3]
        flat = [part.transpose(1, 2).reshape(-1, heads * dim) for part in parts]
        taken = flat[0] if len(flat) == 1 else torch.cat(flat)
        if not self.is_whole:
            taken = _Take.apply(taken, *self._back, *self._into)
        return taken.view(*self.shape, heads, dim).transpose(1, 2)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor,
        shape: tuple[int, int],
        *,
        max_length: int | None = None,
        exact_length: int = 0,
        device: torch.device | str | None = None,
        is_one: bool = False,
    ) -> RowGroups:
        """Of packed sequences. Values are read once; while tracing they are not there, and there is one group.

        Args:
            cu_seqlens: `[sequences + 1]` integers, where the sequences start among all `batch * tokens` tokens, and
                where the last one ends.
            shape: `(batch, tokens)`.
            max_length: Tokens of the longest sequence, or more. Needed while tracing, where it is the length of rows.
            exact_length: Sequences of at most so many tokens have groups of their own (`is_exact`).
            device: Of the tokens; that of `cu_seqlens` if `None`.
            is_one: One group, whatever it wastes.
        Raises: InputError for borders that are none; while tracing, a RuntimeError of torch when the graph runs.
        """
        device = cu_seqlens.device if device is None else torch.device(device)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise InputError(
                "cu_seqlens must be [sequences + 1] of int32 or int64, at least two numbers; got"
                f" {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}. Pass where each sequence starts, and the end of all."
            )
        if torch.compiler.is_compiling():
            return cls._traced(cu_seqlens.to(device), shape, max_length, exact_length)
        starts = cu_seqlens.to("cpu", torch.int64)
        lengths = starts.diff()
        if int(starts[0]) or int(starts[-1]) != shape[0] * shape[1] or bool((lengths < 0).any()):
            raise InputError(f"{_STARTS} ({shape[0] * shape[1]}); got {starts.tolist()[:16]}.")
        if max_length is not None and int(lengths.max()) > max_length:
            raise InputError(
                f"max_length must be that of the longest sequence, {int(lengths.max())}, or more; got {max_length}."
            )
        cost = None if is_one else _GROUP_COST.get(device.type, _GROUP_COST["cuda"])
        return cls._made(None, starts[:-1], lengths, shape, exact_length, device, cost)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        shape: tuple[int, int],
        *,
        exact_length: int = 0,
        device: torch.device | str = "cpu",
    ) -> RowGroups:
        """`from_cu_seqlens` of sequences of these lengths, one after the other."""
        borders = torch.tensor([0, *lengths], device="cpu").cumsum(0)
        return cls.from_cu_seqlens(borders, shape, exact_length=exact_length, device=device)

    @classmethod
    def from_key_mask(cls, key_mask: Tensor, *, exact_length: int = 0) -> RowGroups | None:
        """Of a padded batch, one sequence a row; wherever its padding stands. Reads values: not while tracing.

        Args:
            key_mask: `[batch, tokens]` bool, True where a token is real.
        Returns: `None` for a batch without real tokens.
        """
        mask = key_mask.cpu()
        lengths = mask.sum(-1)
        numbers = mask.flatten().nonzero().squeeze(-1)
        if not numbers.shape[0]:
            return None
        shape = (key_mask.shape[0], key_mask.shape[1])
        starts, device = lengths.cumsum(0) - lengths, key_mask.device
        cost = _GROUP_COST.get(device.type, _GROUP_COST["cuda"])
        return cls._made(numbers, starts, lengths, shape, exact_length, device, cost)

    @classmethod
    def _made(
        cls,
        numbers: Tensor | None,
        starts: Tensor,
        lengths: Tensor,
        shape: tuple[int, int],
        exact_length: int,
        device: torch.device,
        cost: int | None,
    ) -> RowGroups:
        """Of sequences that are neighbours in a list of tokens. All tensors are on the CPU.

        Args:
            numbers: `[n]`, the number of each token of the list in the batch; `None` if they are the same.
            starts, lengths: `[sequences]`, of the sequences in the list.
            cost: Of a group, in tokens; `None` for one group.
        """
        order = lengths.argsort(descending=True, stable=True)
        ordered = lengths[order].tolist()
        found = []
        for first, last, is_exact in parts(ordered, exact_length):
            cuts = [(0, last - first)] if cost is None else partition(ordered[first:last], cost)
            found += [(first + a, first + b, is_exact) for a, b in cuts]
        groups, indices, padding = [], [], []
        place, offset = torch.full((shape[0] * shape[1],), -1, device="cpu"), 0
        for first, last, is_exact in found:
            rows = order[first:last].sort().values  # as they came, which is how they lie in memory
            position = torch.arange(ordered[first], device="cpu")
            real = position < lengths[rows, None]
            index = (starts[rows, None] + position).where(real, starts[rows, None])
            index = index if numbers is None else numbers[index]
            places = offset + torch.arange(index.numel(), device="cpu").view_as(index)
            offset += index.numel()
            place[index[real]] = places[real]
            padding.append(places[~real])
            indices.append(index.flatten())
            is_full = not padding[-1].numel()
            masked = None if is_full else real.to(device)
            shortest = ordered[last - 1]
            groups.append(RowGroup(index.to(device), masked, rows.to(device), is_exact, shortest))
        is_whole = len(groups) == 1 and torch.equal(place, torch.arange(offset, device="cpu"))
        into = _Places(torch.cat(indices).to(device), _or_none(torch.cat(padding), device))
        back = _Places(place.clamp_min(0).to(device), _or_none((place < 0).nonzero().squeeze(-1), device))
        return cls(tuple(groups), place.to(device), shape, len(ordered), is_whole, into, back)

    @classmethod
    def _traced(cls, starts: Tensor, shape: tuple[int, int], max_length: int | None, exact_length: int) -> RowGroups:
        """One group, by arithmetic on tensors: its shape follows from that of `starts` and from `max_length` alone."""
        if max_length is None:
            raise InputError(
                "While tracing (torch.compile, torch.export) the lengths of packed sequences are not there: pass the"
                " longest one as a number, max_length."
            )
        starts, count = starts.long(), starts.shape[0] - 1
        total, lengths = shape[0] * shape[1], starts.diff()
        is_right = (starts[0] == 0) & (starts[-1] == total) & (lengths >= 0).all() & (lengths <= max_length).all()
        torch._assert_async(is_right, f"hf_linattn: {_STARTS}, and no sequence may be longer than max_length.")
        position = torch.arange(max_length, device=starts.device)
        real = position < lengths[:, None]
        index = (starts[:-1, None] + position).clamp_max(total - 1)
        token = torch.arange(total, device=starts.device)
        row = torch.searchsorted(starts[1:], token, right=True).clamp_max(count - 1)
        place = row * max_length + token - starts[row]
        # Within the groups whatever the values: the assertion does not stop a GPU at once.
        back = _Places(place.clamp(0, count * max_length - 1), None)
        group = RowGroup(index, real, torch.arange(count, device=starts.device), max_length <= exact_length)
        return cls((group,), place, shape, count, False, _Places(index.flatten(), ~real.flatten()), back)


def _or_none(numbers: Tensor, device: torch.device) -> Tensor | None:
    return numbers.to(device) if numbers.numel() else None
