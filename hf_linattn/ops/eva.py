r"""EVA: exact attention in a local window, one control-variate summary per chunk elsewhere (Zheng et al. 2023,
arXiv:2302.04542).

In scaled coordinates, with `mu_c` from the means of chunk c:

    chunk value   u_c = sum_n softmax_n(mu_c . y_n - |y_n|^2 / 2) v_n      over the chunk's own keys
    chunk logit   x_t . ybar_c + log(size of c) [+ the chunk's spread]       an estimate of log sum_n exp(x_t . y_n)

and one softmax runs over the window's keys and the chunks. Chunks never straddle a window's border, and a query does
not see the chunks of its own window, so that every key counts exactly once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .exact import attention_function, causal_visibility, exact_partial, scale_inputs
from .lara import add_noise
from .layout import Blocks, fit_window, gather_tokens, masked_mean
from .slots import Partial, mask_logits, merge, weigh
from .tokens import Tokens, prepare

MeanMap = Callable[[Tensor], Tensor]
WEIGHTINGS = ("size", "spread")


class ChunkSummary(NamedTuple):
    """What a query needs of the chunks: mean key, value, log size, spread; `[batch, heads, chunks(, head_dim)]`."""

    key_mean: Tensor
    value: Tensor
    log_size: Tensor
    spread: Tensor | None

    def logits(self, x: Tensor) -> Tensor:
        """Log of the estimated weight of every chunk for every query, `[..., queries, chunks]`."""
        logits = x @ self.key_mean.transpose(-1, -2) + self.log_size.unsqueeze(-2)
        return logits if self.spread is None else logits + x.square() @ self.spread.transpose(-1, -2) / 2

    def select(self, index: Tensor) -> ChunkSummary:
        """Pick chunks per group: `index` `[batch or 1, groups, members]`, negative for none."""
        batch, heads = self.key_mean.shape[:2]
        flat = index.clamp_min(0).flatten(1).expand(batch, -1)

        def pick(z: Tensor) -> Tensor:
            rows = flat[:, None, :, None].expand(-1, heads, -1, z.shape[-1])
            return z.gather(2, rows).unflatten(2, tuple(index.shape[1:]))

        size = pick(self.log_size.unsqueeze(-1)).squeeze(-1).masked_fill((index < 0)[:, None], float("-inf"))
        return ChunkSummary(
            pick(self.key_mean), pick(self.value), size, None if self.spread is None else pick(self.spread)
        )


def chunk_length(window_size: int, num_chunks: int, tokens: Tensor) -> Tensor:
    """The shortest chunk length that gives at most `num_chunks` chunks and fits the windows (element-wise over
    `tokens`).

    It divides `window_size`, or is a multiple of it.
    """
    divisors = torch.tensor([d for d in range(1, window_size + 1) if window_size % d == 0], device=tokens.device)
    wanted = (-(-tokens // num_chunks)).clamp_min(1)
    within = divisors[torch.searchsorted(divisors, wanted.clamp_max(window_size))]
    return torch.where(wanted <= window_size, within, -(-wanted // window_size) * window_size)


def longest_chunk(window_size: int, num_chunks: int, tokens: int) -> int:
    """`chunk_length` of one row, as an integer: known while tracing."""
    wanted = max(1, -(-tokens // num_chunks))
    if wanted > window_size:
        return -(-wanted // window_size) * window_size
    return next(d for d in range(wanted, window_size + 1) if window_size % d == 0)


@torch.compiler.assume_constant_result
def grid_table(height: int, width: int, window: int, chunk: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(chunk members, windows x chunks that overlap, sibling windows) for a grid, with a batch dimension of 1.

    A function of plain values, so `torch.compile` takes it as a constant.
    """
    return tuple(table.to(device).unsqueeze(0) for table in _grid_table((height, width), window, chunk))  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def _grid_table(grid: tuple[int, int], window: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = grid[0] * grid[1]
    cpu = torch.device("cpu")
    windows, chunks = Blocks(tokens, window, grid), Blocks(tokens, chunk, grid)
    window_index, chunk_index = windows.index(cpu), chunks.index(cpu)
    window_of, chunk_of = torch.empty(tokens, dtype=torch.long), torch.empty(tokens, dtype=torch.long)
    for owner, index in ((window_of, window_index), (chunk_of, chunk_index)):
        for number, members in enumerate(index):
            owner[members[members >= 0]] = number
    overlap = torch.zeros(windows.num_blocks, chunks.num_blocks, dtype=torch.bool)
    overlap[window_of, chunk_of] = True
    same = (overlap.long() @ overlap.long().T > 0) & ~torch.eye(windows.num_blocks, dtype=torch.bool)
    if chunk <= window:
        same.fill_(False)
    most = int(same.sum(-1).max())
    siblings = torch.full((windows.num_blocks, most), -1)
    for number, row in enumerate(same):
        members = row.nonzero().squeeze(-1)
        siblings[number, : len(members)] = members
    return chunk_index, overlap, siblings


def _sequence_table(tokens: Tokens, window: int, num_chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for sequences, with a leading batch dimension: rows of different length have different chunks."""
    longest, device = tokens.y.shape[2], tokens.y.device
    lengths = tokens.lengths
    chunk = chunk_length(window, num_chunks, lengths)[:, None]  # [batch, 1]
    most = longest_chunk(window, num_chunks, longest)  # chunks of a shorter row are never longer
    num_windows = -(-longest // window)
    start = torch.arange(min(num_chunks, longest), device=device) * chunk
    members = start[..., None] + torch.arange(most, device=device)
    inside = (members < (start + chunk)[..., None]) & (members < lengths[:, None, None])
    window_start = torch.arange(num_windows, device=device) * window
    overlap = torch.where(
        (chunk <= window)[..., None],
        start[:, None, :] // window == torch.arange(num_windows, device=device)[:, None],
        (window_start // chunk)[..., None] == torch.arange(start.shape[-1], device=device),
    )
    per_chunk = (chunk // window).clamp_min(1)
    own = torch.arange(num_windows, device=device)
    siblings = (own // per_chunk * per_chunk)[..., None] + torch.arange(max(1, most // window), device=device)
    outside = (siblings >= (own // per_chunk * per_chunk + per_chunk)[..., None]) | (siblings == own[:, None])
    siblings = torch.where(outside | (siblings >= num_windows), -1, siblings)
    return torch.where(inside, members, -1), overlap, siblings


def summarise_chunks(
    x: Tensor | None,
    y: Tensor,
    value: Tensor,
    index: Tensor,
    member: Tensor,
    *,
    query_map: MeanMap | None = None,
    key_map: MeanMap | None = None,
    noise: Tensor | bool = False,
    spread: bool = False,
) -> ChunkSummary:
    """Summaries of all chunks.

    Args:
        x: Scaled queries `[batch, heads, tokens, head_dim]`, or `None` to place the proposals by the keys alone.
        y, value: Scaled keys and values of the same shape.
        index: `[batch or 1, chunks, members]` token numbers. member: the same shape, True where there is one.
        noise: Standard normal, `[batch, heads, chunks, head_dim]`, or True to draw it.
    """
    keys = gather_tokens(y, index)
    key_mean = raw_mean = masked_mean(keys, member)
    if key_map:
        key_mean = key_map(key_mean)
    mu = key_mean
    if x is not None:
        query_mean = masked_mean(gather_tokens(x, index), member)
        mu = mu + (query_map(query_mean) if query_map else query_mean)
    mu = add_noise(mu, noise)
    logits = (keys * mu.unsqueeze(-2)).sum(-1) - keys.square().sum(-1) / 2
    logits = mask_logits(logits, member[:, None]).unsqueeze(-2)
    chunk_value = weigh(logits, gather_tokens(value, index)).output.squeeze(-2)
    log_size = member.sum(-1).to(y.dtype).log()[:, None].expand(y.shape[0], y.shape[1], -1)
    variance = None
    if spread:
        variance = masked_mean(
            (keys - raw_mean.unsqueeze(-2)).square().masked_fill(~member[:, None, ..., None], 0.0), member
        )
    return ChunkSummary(key_mean, chunk_value, log_size, variance)


@attention_function
def eva_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window_size: int = 64,
    overlap_window: bool = False,
    num_chunks: int = 128,
    chunk_size: int = 8,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    query_proposals: bool = True,
    weighting: str = "size",
    query_map: MeanMap | None = None,
    key_map: MeanMap | None = None,
    noise: Tensor | bool = False,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    slot_dropout: float = 0.0,
) -> Tensor:
    """EVA attention.

    Source: Zheng et al. 2023, arXiv:2302.04542, section 4. Differs from it: chunks weigh by their size, a key in the
    window is not also in a visible chunk, windows and chunks are those of a row's real tokens, any length works.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`. In the causal form queries may be fewer than keys (the
            last ones), if the proposals come from the keys alone.
        window_size: Tokens of a window (side of a square with a `grid`), at least 1.
        num_chunks: Upper bound of the number of chunks (bidirectional). Chunk lengths divide the window or are
            multiples of it; in a chunk larger than a window, the other windows of a query's own chunk are summaries of
            their own.
        chunk_size: Tokens of a chunk in the causal form, a divisor of `window_size`. Fixed, so that a prefix never
            changes.
        key_mask: `[batch, tokens]` bool, True where a token is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        is_causal: No query sees a later key: chunks are visible once the window they lie in has passed.
        query_proposals: Place proposals at mean query + mean key (bidirectional form) rather than at the mean key.
        weighting: "size", or "spread", which adds half the variance of the chunk's keys along the query (diagonal).
        query_map, key_map: Applied to the mean query and key of a chunk, `[batch, heads, chunks, head_dim]`.
        noise: Standard normal, `[batch, heads, chunks, head_dim]`, or True to draw it, added to the proposals.
        grid, num_global_tokens, slot_dropout: As in `favor_attention`.
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`; zeros for padded queries.
    Raises: InputError if shapes or options do not fit.
    Cost: O(tokens * (window_size + num_chunks) * head_dim); causal O(tokens * (window_size + tokens / chunk_size) *
        head_dim). Random: only through `noise` and `slot_dropout`.
    """
    if window_size < 1 or num_chunks < 1:
        raise InputError(f"window_size and num_chunks must be >= 1; got {window_size!r} and {num_chunks!r}.")
    if weighting not in WEIGHTINGS:
        raise InputError(f"weighting must be one of {list(WEIGHTINGS)}; got {weighting!r}.")
    if is_causal and (chunk_size < 1 or window_size % chunk_size):
        raise InputError(
            f"chunk_size must divide window_size in the causal form; got {chunk_size!r} and {window_size!r}."
        )
    if is_causal and query_proposals and query.shape[2] != key.shape[2]:
        raise InputError(
            f"Causal EVA with query_proposals=True needs the queries of all tokens; got {query.shape[2]} queries and"
            f" {key.shape[2]} keys. Use query_proposals=False with a cache of keys, or recompute without a cache."
        )
    x, y = scale_inputs(query, key, scaling)
    tokens = prepare(x, y, value, key_mask, is_causal=is_causal, num_global_tokens=num_global_tokens, grid=grid)
    if tokens.y.shape[2] == 0:
        return tokens.finish(None)
    num_tokens, device = tokens.y.shape[2], y.device
    window_size = fit_window(window_size, num_tokens, grid)
    windows = Blocks(num_tokens, window_size, grid)
    block_x, block_y, block_value = (windows.split(z) for z in (tokens.x, tokens.y, tokens.value))
    seen = windows.real(tokens.valid, device)[:, None, :, None, :]
    if is_causal:
        seen = seen & causal_visibility(window_size, window_size, device)
    partials = [exact_partial(block_x, block_y, block_value, seen)]

    if windows.num_blocks > 1:
        siblings = None
        if is_causal:
            # Only chunks of complete windows are ever visible, so the last window needs none.
            chunks = Blocks((windows.num_blocks - 1) * window_size, chunk_size)
            index = chunks.index(device).unsqueeze(0)
            ends = (torch.arange(index.shape[1], device=device) + 1) * chunk_size
            visible = (ends <= torch.arange(windows.num_blocks, device=device)[:, None] * window_size).unsqueeze(0)
        elif grid is not None:
            side = longest_chunk(window_size, max(1, int(num_chunks**0.5)), max(grid))
            index, overlap, own_chunk = grid_table(*grid, window_size, side, str(device))
            visible, siblings = ~overlap, own_chunk if side > window_size else None
        else:
            index, overlap, own_chunk = _sequence_table(tokens, window_size, num_chunks)
            coarse = longest_chunk(window_size, num_chunks, num_tokens) > window_size
            visible, siblings = ~overlap, own_chunk if coarse else None
        member = (index >= 0) & (index < tokens.lengths[:, None, None])
        spread = weighting == "spread"
        source = tokens.x if query_proposals else None
        maps = {"query_map": query_map, "key_map": key_map}
        summary = summarise_chunks(source, tokens.y, tokens.value, index, member, noise=noise, spread=spread, **maps)
        partials.append(_read(block_x, summary, visible, slot_dropout))
        if siblings is not None:
            index = windows.index(device).unsqueeze(0)
            member = (index >= 0) & (index < tokens.lengths[:, None, None])
            pieces = summarise_chunks(
                source, tokens.y, tokens.value, index, member, noise=noise is True, spread=spread, **maps
            ).select(siblings)
            partials.append(weigh(pieces.logits(block_x), pieces.value, dropout=slot_dropout))
    partial = merge(partials)
    return tokens.finish(
        Partial(windows.join(partial.output), windows.join(partial.log_mass.unsqueeze(-1)).squeeze(-1))
    )


def _read(block_x: Tensor, summary: ChunkSummary, visible: Tensor, dropout: float) -> Partial:
    """Queries of every window read all visible chunks: `visible` is `[batch or 1, windows, chunks]`."""
    size = block_x.shape[-2]
    logits = summary.logits(block_x.flatten(2, 3)).unflatten(2, (-1, size))
    logits = mask_logits(logits, visible[:, None, :, None, :]).flatten(2, 3)
    read = weigh(logits, summary.value, dropout=dropout)
    return Partial(read.output.unflatten(2, (-1, size)), read.log_mass.unflatten(2, (-1, size)))
