"""How much a layer exchanges where processes share a sequence: what `collectives.Traffic` counts, on paper."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..modules.registry import get_kind
from ..ops.favor.statistics import DENSE_VARIANTS
from . import states
from .eva_plan import eva_traffic


@dataclass(frozen=True, kw_only=True)
class SharedLayer:
    """A layer of any kind, and the tokens that a process has.

    Args:
        kind: Its name.
        rows: Sequences of a batch. length: Tokens of a process.
        slots: Per head: features, samples, learned slots. EVA: `num_chunks`; causal none.
        window_size, overlap_window, chunk_size, max_chunks, num_global_tokens: As the settings of these names.
        statistics: The variant of FAVOR# with statistics of the row; `None` without these.
        is_generalized: FAVOR+ with a generalised kernel.
        learned: EVA: whether summaries are trained. sends_queries, has_spread: Whether chunks need them.
        is_masked: Whether there is a mask. is_random: Bidirectional EVA: whether there is noise or slot dropout.
        token_bytes: Of a number of queries, keys and values, as they are computed with: 4 at least on a CPU. States
            have 4 at least everywhere.
    """

    kind: str
    is_causal: bool
    rows: int
    heads: int
    head_dim: int
    length: int
    slots: int = 0
    window_size: int = 0
    overlap_window: bool = False
    chunk_size: int = 1
    max_chunks: int | None = None
    num_global_tokens: int = 0
    statistics: str | None = None
    is_generalized: bool = False
    learned: bool = False
    sends_queries: bool = False
    has_spread: bool = False
    is_masked: bool = False
    is_random: bool = False
    token_bytes: int = 4

    @property
    def has_chunks(self) -> bool:
        """Whether keys are read through chunks and not through slots."""
        return get_kind(self.kind).size_field == "num_chunks"

    @property
    def number(self) -> int:
        """Bytes of a number of every row and head."""
        return self.rows * self.heads * max(4, self.token_bytes)

    @property
    def state(self) -> int:
        """Bytes of what slots have read."""
        return self.number * self.slots * (self.head_dim + 1)

    def tokens(self, count: int, *, tensors: int) -> int:
        """Bytes of some tensors (queries, keys, values) of so many tokens."""
        return self.rows * self.heads * count * self.head_dim * tensors * self.token_bytes


def expected_traffic(layer: SharedLayer, processes: int, rank: int = 1) -> dict[str, int]:
    """Bytes that process `rank` receives in one forward and one backward pass, by the names of `Traffic`.

    Names that end with "backward" belong to the backward pass. The sizes do not depend on the number of tokens, but
    for causal EVA without `max_chunks`, and for EVA whose chunks are longer than a window.
    """
    found: Counter[str] = Counter()
    if layer.is_causal:
        _causal(found, layer, processes, rank)
    else:
        (_chunks_of_rows if layer.has_chunks else _slots)(found, layer, processes, rank)
        _global_tokens(found, layer, (rank > 0, rank < processes - 1))
    return {name: size for name, size in found.items() if size}


def _causal(found: Counter[str], layer: SharedLayer, processes: int, rank: int) -> None:
    if layer.has_chunks:
        _chunks(found, layer, processes)
    else:
        _states(found, layer, processes, rank, sides=[-1])
    if layer.overlap_window:
        sent = layer.tokens(layer.window_size, tensors=3 if layer.sends_queries else 2)
        before = 0 if layer.has_chunks else layer.state
        found["neighbour"] += (rank > 0) * (sent + before)
        # Where a part is one block there is nothing before the window, and no gradient of it.
        before = before if layer.length > layer.window_size else 0
        found["neighbour backward"] += (rank < processes - 1) * (sent + before)


def _states(found: Counter[str], layer: SharedLayer, processes: int, rank: int, sides: list[int]) -> None:
    """Those of all other processes, or of the earlier ones."""
    if processes <= states.GATHERED:
        _both(found, "gather", processes * layer.state)
        return
    for side in sides:
        for step in states.scan_steps(processes, gap=2 if layer.overlap_window else 1):
            # Gradients go where states have come from.
            found["neighbour"] += (0 <= rank + side * step < processes) * layer.state
            found["neighbour backward"] += (0 <= rank - side * step < processes) * layer.state


def _slots(found: Counter[str], layer: SharedLayer, processes: int, rank: int) -> None:
    _statistics(found, layer, processes)
    if not layer.window_size:
        has_factor = not (layer.is_generalized or layer.num_global_tokens)  # that all keys have in common
        found["maximum"] += layer.number * (layer.slots + has_factor)
        _both(found, "reduce", layer.state)
    else:
        _states(found, layer, processes, rank, sides=[-1, 1])
    if layer.overlap_window:
        sides = (rank > 0) + (rank < processes - 1)
        _both(found, "neighbour", sides * (layer.tokens(layer.window_size, tensors=2) + layer.state))
        found["neighbour"] += sides * layer.rows * layer.window_size  # a byte a place: whether it is real


def _chunks_of_rows(found: Counter[str], layer: SharedLayer, processes: int, rank: int) -> None:
    found += eva_traffic(
        rows=layer.rows,
        heads=layer.heads,
        head_dim=layer.head_dim,
        length=layer.length,
        processes=processes,
        rank=rank,
        window_size=layer.window_size,
        num_chunks=layer.slots,
        overlap_window=layer.overlap_window,
        learned=layer.learned,
        sends_queries=layer.sends_queries,
        has_spread=layer.has_spread,
        is_masked=layer.is_masked or layer.num_global_tokens > 0,  # padding takes their places at the end
        is_random=layer.is_random,
        token_bytes=layer.token_bytes,
    )


def _global_tokens(found: Counter[str], layer: SharedLayer, sides: tuple[bool, bool]) -> None:
    """Their tensors for all processes, what they have read of all, and tokens that parts hand on."""
    count, (has_left, has_right) = layer.num_global_tokens, sides
    one, real, read = layer.tokens(count, tensors=1), layer.rows * count, layer.number * count
    _both(found, "reduce", 3 * one + read * (layer.head_dim + 1))
    found["reduce"] += real
    found["maximum"] += read
    found["neighbour"] += has_right * (3 * one + real) + has_left * one
    found["neighbour backward"] += has_left * 3 * one + has_right * one


def _both(found: Counter[str], name: str, size: int) -> None:
    found[name] += size
    found[f"{name} backward"] += size


def _statistics(found: Counter[str], layer: SharedLayer, processes: int) -> None:
    """Counts, means and scatters of queries and keys."""
    if layer.statistics is None:
        return
    dense, dim = layer.statistics in DENSE_VARIANTS, layer.head_dim
    counts = layer.rows if layer.is_masked else 1
    numbers = 2 * (counts + layer.rows * layer.heads * (dim + (dim * dim if dense else dim)))
    found["gather"] += processes * numbers * (8 if dense else max(4, layer.token_bytes))


def _chunks(found: Counter[str], layer: SharedLayer, processes: int) -> None:
    own = layer.length // layer.chunk_size
    if layer.max_chunks is not None:  # and one for all older ones
        own = min(own, 1 + layer.max_chunks + layer.overlap_window * layer.window_size // layer.chunk_size)
    chunks = processes * layer.rows * layer.heads * own
    vectors = chunks * layer.head_dim * layer.token_bytes * (3 if layer.has_spread else 2)
    weights = chunks * max(4, layer.token_bytes)
    found["gather"] += vectors + weights
    found["gather backward"] += vectors + (weights if layer.learned else 0)
