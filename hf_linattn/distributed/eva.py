"""Bidirectional EVA over a sequence whose tokens are spread over processes.

Windows and chunks are those of the whole row, and follow from its number of real tokens, which all processes know from
one exchange. Parts are whole windows. A window that overlaps takes in tokens of the parts beside its own; summaries of
chunks are made by all processes together (`eva_chunks.py`); of a chunk that a window sees in part, the other windows
are summarised where they are, and their summaries exchanged. Then every window reads what it reads in one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.attention_state import AttentionState
from ..modules.contract import AttentionInputs
from ..modules.kinds.eva import EvaAttention
from ..ops.eva.chunks import MakesSummaries, Summaries
from ..ops.eva.estimate import CHUNK, WINDOW, chunk_numbers, dropped_members, fit_bias, windows_and_chunks
from ..ops.eva.exclusive import chunk_length, longest_chunk, partly_seen_windows, reaches, unread_chunks
from ..ops.eva.layout import ChunkOptions, Chunks, Layout
from ..ops.inputs import factor_of
from ..ops.layout import Blocks, WindowedBlocks
from ..ops.noise import Dropped, RowNoise, SlotDropout
from ..ops.padding import Tokens
from .collectives import SequenceGroup
from .eva_chunks import SharedChunks, chunk_summaries, exchanged


def eva_refusal(layer: EvaAttention) -> str | None:
    """Why a bidirectional layer cannot share a sequence between processes, and what to set; `None` if it can."""
    if layer.config.chunking == "published":
        return "chunking='published', whose chunks do not fit the windows. Set chunking='exclusive'."
    return None


def eva_reader(
    layer: EvaAttention, inputs: AttentionInputs, group: SequenceGroup
) -> tuple[Callable[[Tokens], AttentionState], tuple[str, ...]]:
    """What the queries of a part read, as `eva_attention` says; and where they are taken in half precision.

    Args: layer: One that `eva_refusal` says nothing against.
    """
    options, summarise, window_bias = layer.layout_and_summaries(scaling=factor_of(inputs.query, inputs.scaling))
    noise = _row_noise(layer, inputs, group)
    sampled = noise if layer.config.sample_noise else None
    drop = None
    if noise is not None and layer.config.slot_dropout:
        drop = SlotDropout(layer.config.slot_dropout, noise)

    def read(tokens: Tokens) -> AttentionState:
        rows = _Rows.of(options, tokens, group)
        summaries = chunk_summaries(summarise, tokens, rows.chunks(tokens.valid), group, sampled)
        unseen_windows = _unseen_windows(summarise, tokens, rows, group, sampled)

        left, right, reach = rows.reaches()
        windows = WindowedBlocks(Blocks(rows.part, options.window_size), left, right, has_neighbours=True)
        layout, query = Layout(windows, None, reach), windows.blocks.split(tokens.query)
        around = _with_neighbours(tokens, rows, left, group) if left else tokens
        bias, join = fit_bias(window_bias, options, layout, tokens.key), windows.blocks.join

        def dropped(member: Tensor, sort: int) -> Dropped | None:
            return dropped_members(drop, query, windows.blocks.split(rows.places[:, None]), member, sort)

        without = dropped(chunk_numbers(summaries), CHUNK)
        state = windows_and_chunks(around, query, layout, summaries, rows.unread_chunks(), bias=bias, dropped=without)
        if unseen_windows is not None:
            state = unseen_windows.join(state, query, dropped=dropped(rows.partly_seen_windows(), WINDOW))
        return AttentionState(join(state.output), join(state.lse.unsqueeze(-1)).squeeze(-1))

    return read, ("cuda",)


def _row_noise(layer: EvaAttention, inputs: AttentionInputs, group: SequenceGroup) -> RowNoise | None:
    """Where random numbers come from in training: for all processes what the first one has; `None` if none are drawn.

    Each process has the same rows, but draws by itself unless training has told the layer its place.
    """
    if not inputs.training or not (layer.config.sample_noise or layer.config.slot_dropout):
        return None
    noise = inputs.noise or RowNoise.drawn(inputs.query)
    keys = group.gather(torch.cat([noise.keys, noise.common]).to(inputs.query.device))[0]
    return replace(noise, keys=keys[:-1], common=keys[-1:])


@dataclass(frozen=True)
class _Rows:
    """Where windows and chunks of whole rows lie, as seen from the process with part number `rank`.

    lengths: Real tokens of a row, `[batch]`; `[1]` if `are_full`, without padding. length: Tokens of its chunks,
        `[batch or 1, 1]`.
    longest: Tokens of a chunk of a full row. part: Tokens of a part.
    """

    options: ChunkOptions
    lengths: Tensor
    length: Tensor
    are_full: bool
    longest: int
    part: int
    processes: int
    rank: int

    @staticmethod
    def of(options: ChunkOptions, tokens: Tokens, group: SequenceGroup) -> _Rows:
        window, part, mask = options.window_size, tokens.key.shape[2], tokens.valid
        most = group.size * part
        lengths = torch.full((1,), most, device=tokens.key.device) if mask is None else group.reduce(mask.sum(-1))
        length = chunk_length(window, options.num_chunks, lengths)[:, None]
        longest = longest_chunk(window, options.num_chunks, most)
        return _Rows(options, lengths, length, mask is None, longest, part, group.size, group.rank)

    @property
    def first(self) -> int:
        """The place of this part's first token in the whole row."""
        return self.rank * self.part

    @property
    def places(self) -> Tensor:
        """Of this part's tokens in the whole row."""
        return torch.arange(self.first, self.first + self.part, device=self.length.device)

    @property
    def num_chunks(self) -> int:
        """Of the row with most chunks."""
        most = self.processes * self.part
        return -(-most // self.longest) if self.are_full else min(self.options.num_chunks, most)

    @property
    def windows(self) -> Tensor:
        """The numbers of this part's windows in the whole row."""
        begin, count = self.first // self.options.window_size, self.part // self.options.window_size
        return torch.arange(begin, begin + count, device=self.length.device)

    def chunks(self, valid: Tensor | None) -> SharedChunks:
        """The chunks of all rows; `valid` as in `Tokens`."""
        device, number = self.length.device, self.num_chunks
        unit = math.gcd(self.longest, self.part) if self.are_full else 1
        begins = torch.arange(number, device=device) * self.length
        count = (self.lengths[:, None] - begins).clamp_min(0).minimum(self.length)
        own = torch.arange(self.first, self.first + self.part, unit, device=device) // self.length
        return SharedChunks(count, own.clamp_max(number - 1), unit, valid)

    def reaches(self) -> tuple[int, int, Tensor | None]:
        """How far windows reach, as `exclusive.reaches` says it."""
        options, length = self.options, None if self.are_full else self.length
        return reaches(options.overlap_side, options.window_size, self.longest, length)

    def unread_chunks(self) -> tuple[Tensor, Tensor]:
        """`Chunks.unread_range` of this part's windows."""
        options, (left, right, reach) = self.options, self.reaches()
        sides = (left, right) if reach is None else (reach, reach)
        return unread_chunks(options, self.windows, options.window_size, self.length, self.num_chunks, *sides)

    def partly_seen_windows(self) -> Tensor:
        """`Chunks.partly_seen_windows` of this part's windows, by numbers in the whole row."""
        window = self.options.window_size
        per_chunk, most = (self.length // window).clamp_min(1), self.longest // window
        return partly_seen_windows(self.options, self.windows, self.processes * self.part // window, per_chunk, most)


def _with_neighbours(tokens: Tokens, rows: _Rows, reach: int, group: SequenceGroup) -> Tokens:
    """With keys and values of `reach` tokens of the parts before and after."""
    dims, both = (tokens.key.shape[-1], tokens.value.shape[-1]), torch.cat([tokens.key, tokens.value], -1)
    before, after = group.from_left(both[:, :, -reach:]), group.from_right(both[:, :, :reach])
    key, value = torch.cat([before, both, after], 2).split(dims, -1)
    place = torch.arange(rows.first - reach, rows.first + rows.part + reach, device=key.device)
    return replace(tokens, key=key, value=value, valid=(place >= 0) & (place < rows.lengths[:, None]))


def _unseen_windows(
    summarise: MakesSummaries, tokens: Tokens, rows: _Rows, group: SequenceGroup, noise: RowNoise | None
) -> Summaries | None:
    """What every window here reads of windows that lie in a chunk which it sees in part; `None` if no chunk is longer
    than a window.

    Returns: `[batch, heads, windows, n(, head_dim)]`.
    """
    window = rows.options.window_size
    if rows.longest <= window:
        return None
    blocks = Blocks(rows.part, window)
    member = WindowedBlocks(blocks).real(tokens.valid, tokens.key.device)
    chunks = Chunks(blocks.split, member, None, blocks.num_blocks)
    numbers: Tensor | bool = False
    if noise is not None:
        numbers = noise.apart().normal(tokens.key[:, :, : blocks.num_blocks], rows.windows)
    own = summarise(tokens.query, tokens.key, tokens.value, chunks, numbers)
    index, per_chunk = rows.partly_seen_windows(), rows.longest // window
    if per_chunk > blocks.num_blocks:
        return exchanged(own, lambda z: group.gather(z).movedim(0, 2).flatten(2, 3)).select(index)

    def with_neighbours(z: Tensor) -> Tensor:  # no chunk reaches further
        return torch.cat([group.from_left(z[:, :, -per_chunk:]), z, group.from_right(z[:, :, :per_chunk])], 2)

    begin = rows.first // window - per_chunk
    return exchanged(own, with_neighbours).select(torch.where(index < 0, index, index - begin))
