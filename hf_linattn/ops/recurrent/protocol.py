"""What every kind's recurrent form can do; `slots.SlotRecurrence` and EVA's are the two that exist, and
`exact_start.ExactStart` goes round either."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from torch import Tensor

from .window_tokens import WindowTokens


class State(Protocol):
    """What is kept of the tokens seen so far: a frozen dataclass of tensors, rows first."""

    @property
    def window(self) -> WindowTokens: ...

    def rows(self, index: Tensor) -> State:
        """Pick rows `[rows]`, as beam search does."""


S = TypeVar("S", bound=State)


class Recurrence(Protocol[S]):
    """Causal attention a piece at a time. No method changes the state it is given.

    `keeps_queries`: `attend` and `absorb` need the queries of all new tokens, not of the last ones alone.
    """

    @property
    def keeps_queries(self) -> bool: ...

    def start(self, key: Tensor, value: Tensor, *, static_tokens: int | None = None) -> S:
        """The state before the first token, for keys and values like these.

        Args:
            static_tokens: All shapes stay the same from here on, with room for so many tokens where it is needed.
        """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, state: S) -> Tensor:
        """What the new tokens' queries read, `[batch, heads, queries, head_dim]`: the parallel form."""

    def absorb(self, query: Tensor | None, key: Tensor, value: Tensor, key_mask: Tensor | None, state: S) -> S:
        """The state after these tokens as well."""

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, state: S, valid: Tensor | None = None
    ) -> tuple[Tensor, S]:
        """`attend` and `absorb` for one token of every row, in a few operations and without gradients."""


def state_tensors(state: Any) -> Iterator[Tensor]:
    """All tensors of a state (a tree of dataclasses and tuples), always in the same order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from state_tensors(part)
    elif dataclasses.is_dataclass(state):
        for field in dataclasses.fields(state):
            yield from state_tensors(getattr(state, field.name))


def map_state(state: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A state of the same form with `fn` of every tensor."""
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, tuple):
        parts = [map_state(part, fn) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(state):
        values = {field.name: map_state(getattr(state, field.name), fn) for field in dataclasses.fields(state)}
        return dataclasses.replace(state, **values)  # type: ignore[type-var]
    return state
