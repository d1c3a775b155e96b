"""Which units of keys a block of queries reads through slots."""

from __future__ import annotations

from typing import NamedTuple


class BlockReach(NamedTuple):
    """Block t covers the units `t * units .. (t + 1) * units - 1` and reads those before and after, not its own.

    units: Units of keys per block of queries.
    margin: Units next to a block that it does not read either (its window covers them).
    is_causal: Only units before are read, and only the ones to the left have a margin.
    """

    units: int = 1
    margin: int = 0
    is_causal: bool = False

    def before(self, block: int) -> int:
        """Block `block` reads the units below this number."""
        return max(0, block * self.units - self.margin)

    def after(self, block: int, num_units: int) -> int:
        """And, unless causal, the units from this number on."""
        return min(num_units, (block + 1) * self.units + self.margin)
