"""How the rows of a batch are spread over the processes that share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .collectives import SequenceGroup


@dataclass(frozen=True)
class SequenceParts:
    """Each process has `length` tokens of every row: the first one the first tokens, and so on.

    The layers ask for rows whose real tokens come first, so those are moved to the front; padding is added at the end
    until all parts are equally long. What belongs to a token (its position, its label) moves with it.

    Args:
        group: The processes.
        tokens: Of a whole row.
        length: Of a part.
        order: `[batch, tokens]`, the columns of each row, real tokens first; `None` if that is how they stand.
        is_padded: Whether any part has padding. The same on all processes.
    """

    group: SequenceGroup
    tokens: int
    length: int
    order: Tensor | None
    is_padded: bool

    @classmethod
    def of(cls, group: SequenceGroup, mask: Tensor, multiple: int = 1, least: int = 1) -> SequenceParts:
        """Parts of the same number of whole blocks of `multiple` tokens, `least` tokens or more.

        Args:
            mask: `[batch, tokens]` bool, True where a token is real. The same on all processes.
        """
        tokens = mask.shape[1]
        length = -(-max(tokens, least * group.size) // (group.size * multiple)) * multiple
        stands_first = bool((mask[:, :-1] | ~mask[:, 1:]).all())
        order = None if stands_first else mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        return cls(group, tokens, length, order, length * group.size > tokens or not bool(mask.all()))

    def cut(self, x: Tensor, fill: int | bool) -> Tensor:
        """This process's part of whole rows: `[batch or 1, tokens, ...]` becomes `[batch or 1, length, ...]`.

        Args:
            fill: What the tokens get that are added at the end.
        """
        own = slice(self.group.rank * self.length, (self.group.rank + 1) * self.length)
        if self.order is None:
            part = x[:, own]
        else:
            columns = self.order[:, own]
            part = x.expand(len(columns), *x.shape[1:])[_rows(columns), columns]
        missing = self.length - part.shape[1]
        return (
            torch.cat([part, part.new_full((part.shape[0], missing, *part.shape[2:]), fill)], 1) if missing else part
        )

    def join(self, x: Tensor) -> Tensor:
        """Whole rows from the parts of all processes: `[batch, length, ...]` becomes `[batch, tokens, ...]` on each.

        With gradient: a part gets what all processes have for it.
        """
        whole = self.group.gather(x).transpose(0, 1).flatten(1, 2)[:, : self.tokens]
        if self.order is None:
            return whole
        place = self.order.argsort(dim=1)
        return whole[_rows(place), place]

    def column(self, x: Tensor, index: int) -> Tensor:
        """One column of whole rows, `[batch, 1, ...]`, on all processes, from parts `[batch, length, ...]`.

        As `join`, for a model that reads one token.
        """
        if self.order is None:
            place = torch.full((x.shape[0],), index, device=x.device)
        else:
            place = (self.order == index).to(torch.uint8).argmax(dim=1)
        place = place - self.group.rank * self.length
        is_here = (place >= 0) & (place < self.length)
        found = x[torch.arange(x.shape[0], device=x.device), place.clamp(0, self.length - 1)]
        found = torch.where(is_here.view(-1, *[1] * (x.ndim - 2)), found, 0)
        return self.group.reduce(found)[:, None]


def _rows(columns: Tensor) -> Tensor:
    return torch.arange(columns.shape[0], device=columns.device)[:, None]
