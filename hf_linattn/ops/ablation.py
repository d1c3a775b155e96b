"""Attention of which a part is taken away, to see what a model lives on (`conversion/ablation.py`, `compare`).

Within `ablate(name)` the attention functions of this thread ask here, at `ExactAttention.with_slots`, `slots_alone`,
`eva_estimate` and `GlobalTokens.join`, what becomes of their exact keys and of their slots. Elsewhere they look once
whether `ABLATED` is empty.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW_ALONE = "window_alone"  # slots hold no mass
SLOTS_ALONE = "slots_alone"  # no key is exact: all go through slots
SHUFFLED_SLOTS = "shuffled_slots"  # a query reads slot j + 1 where it should read slot j
ABLATIONS = (WINDOW_ALONE, SLOTS_ALONE, SHUFFLED_SLOTS)

# Nothing is taken away: slots have the value 1, exact keys 0, and the output is the share of the slots in the weights.
SLOT_SHARE = "slot_share"


@dataclass
class Ablation:
    """What is asked for within `ablate`, and whether an attention function has followed."""

    names: frozenset[str]
    was_followed: bool = False


# By thread: other models may run beside. Not a context variable, which compiled code cannot read.
ABLATED: dict[int, Ablation] = {}


@contextmanager
def ablate(name: str) -> Iterator[Ablation]:
    """Attention functions called in the `with` block, by this thread, go without a part of theirs. Blocks add up.

    Args:
        name: One of `ABLATIONS`, or `SLOT_SHARE`.
    """
    thread = threading.get_ident()
    before = ABLATED.get(thread)
    ABLATED[thread] = asked = Ablation(frozenset({name}) if before is None else before.names | {name})
    try:
        yield asked
    finally:
        if before is None:
            del ABLATED[thread]
        else:
            before.was_followed |= asked.was_followed
            ABLATED[thread] = before


def current_ablations() -> frozenset[str]:
    """What this thread's attention functions go without."""
    asked = ABLATED.get(threading.get_ident())
    if asked is None:
        return frozenset()
    asked.was_followed = True
    return asked.names


def exact_value(value: Tensor) -> Tensor:
    """The values of keys that are read exactly."""
    return torch.zeros_like(value) if SLOT_SHARE in current_ablations() else value
