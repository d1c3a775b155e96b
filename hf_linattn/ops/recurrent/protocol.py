"""What every kind's recurrent form can do; `slots.SlotRecurrence` and EVA's are the two that exist."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor


class State(Protocol):
    """What is kept of the tokens seen so far: a frozen dataclass of tensors, rows first."""

    def rows(self, index: Tensor) -> State:
        """Pick rows `[rows]`, as beam search does."""


S = TypeVar("S", bound=State)


class Recurrence(Protocol[S]):
    """Causal attention a piece at a time. No method changes the state it is given.

    `keeps_queries`: `attend` and `absorb` need the queries of all new tokens, not of the last ones alone.
    """

    @property
    def keeps_queries(self) -> bool: ...

    def start(self, key: Tensor, value: Tensor, *, is_static: bool = False) -> S:
        """The state before the first token, for keys and values like these; `is_static` for static shapes."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, state: S) -> Tensor:
        """What the new tokens' queries read, `[batch, heads, queries, head_dim]`: the parallel form."""

    def absorb(self, query: Tensor | None, key: Tensor, value: Tensor, key_mask: Tensor | None, state: S) -> S:
        """The state after these tokens as well."""

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, state: S, valid: Tensor | None = None
    ) -> tuple[Tensor, S]:
        """`attend` and `absorb` for one token of every row, in a few operations and without gradients."""
