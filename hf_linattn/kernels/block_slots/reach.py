"""Which units of keys a block of queries reads through slots."""

from __future__ import annotations

from typing import NamedTuple


class BlockReach(NamedTuple):
    """Block t covers the units `t * units .. (t + 1) * units - 1`. It reads those below `t * units - margin` and,
    unless causal, those from `(t + 1) * units + margin` on.

    units: Units of keys per block of queries.
    margin: Units next to a block that it does not read either (its window covers them).
    is_causal: Only units before are read, and only the ones to the left have a margin.
    """

    units: int = 1
    margin: int = 0
    is_causal: bool = False
