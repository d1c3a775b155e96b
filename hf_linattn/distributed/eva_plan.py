"""How much bidirectional EVA exchanges where processes share a sequence, on paper."""

from __future__ import annotations

from collections import Counter

from ..ops.eva.exclusive import longest_chunk, longest_reach, window_reach


def eva_traffic(
    *,
    rows: int,
    heads: int,
    head_dim: int,
    length: int,
    processes: int,
    rank: int,
    window_size: int,
    num_chunks: int,
    overlap_window: bool = False,
    learned: bool = False,
    sends_queries: bool = False,
    has_spread: bool = False,
    is_masked: bool = False,
    is_random: bool = False,
    token_bytes: int = 4,
) -> dict[str, int]:
    """Bytes that process `rank` receives in one forward and one backward pass, by the names of `Traffic`.

    Summaries of chunks are `num_chunks (3 head_dim + 2)` numbers per head, with a spread `head_dim` more. They do not
    depend on the number of tokens; nor do the tokens that windows reach to. Where chunks are longer than a window,
    there is a summary of every window as well: of as many as a chunk has from each neighbour, or of all if chunks are
    longer than a part.

    Args:
        rows: Sequences of a batch. length: Tokens of a process.
        sends_queries: Whether proposals are made of queries (`proposals` "sum" or "mean"). has_spread: Whether
            `weighting` is "spread".
        is_masked: Whether there is a mask: rows may then have fewer tokens, and chunks of any length.
        is_random: Whether there is noise or slot dropout.
        token_bytes: Of a number of queries, keys and values. Summaries are exchanged in 4 bytes at least.
    """
    found: Counter[str] = Counter()
    tokens, sides = processes * length, int(rank > 0) + int(rank < processes - 1)
    longest = longest_chunk(window_size, num_chunks, tokens)
    chunks = min(num_chunks, tokens) if is_masked else -(-tokens // longest)
    number = rows * heads * max(4, token_bytes)  # bytes of one number of every row and head

    # Learned: a weighted key and a weighted value, with a total each. Otherwise means first, then values and totals.
    own = 2 * head_dim + 2 if learned else head_dim * (2 + sends_queries + has_spread) + 1
    _both(found, "reduce", chunks * own * number)
    found["maximum"] += chunks * (2 if learned else 1) * number
    if is_masked:
        found["reduce"] += rows * 8  # the lengths
    if is_random:
        found["gather"] += processes * (rows + 1) * 8  # the keys of random numbers
    if overlap_window:
        # Windows of a row with shorter chunks may reach further.
        reach = longest_reach(window_size, longest) if is_masked else window_reach(window_size, longest)
        _both(found, "neighbour", sides * rows * heads * reach * 2 * head_dim * token_bytes)
    if longest > window_size:
        summary = number * (head_dim * (2 + has_spread) + 1)
        if longest > length:
            _both(found, "gather", processes * (length // window_size) * summary)
        else:
            _both(found, "neighbour", sides * (longest // window_size) * summary)
    return {name: size for name, size in found.items() if size}


def _both(found: Counter[str], name: str, size: int) -> None:
    found[name] += size
    found[f"{name} backward"] += size
