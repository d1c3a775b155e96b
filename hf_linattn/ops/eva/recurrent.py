r"""Causal EVA token by token: summaries of the chunks that have left the window, and the tokens that have not.

Windows and chunks are those of a row's real tokens, and the tokens of the state begin with a window; so the parallel
form on these and the new tokens, reading the earlier chunks as well, gives what it gives on the whole sequence. With
`max_chunks` the state does not grow: the latest summaries, and one of all that are older.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from ..inputs import prepare_tokens
from ..layout import Blocks
from ..noise import SlotDropout
from ..precision import compute_dtype
from ..proposal_map import ProposalMap
from ..recurrent.window_tokens import WindowShape, WindowTokens, each_of, may_look
from .chunks import MakesSummaries, Summaries, Summariser
from .estimate import eva_estimate
from .layout import ChunkOptions, Chunks
from .state import EvaState


def eva_recurrence(
    *,
    window_size: int,
    chunk_size: int | None,
    overlap_window: bool = False,
    chunking: str = "exclusive",
    max_chunks: int | None = None,
    proposals: str = "sum",
    weighting: str = "size",
    query_map: ProposalMap | None = None,
    key_map: ProposalMap | None = None,
    window_bias: Tensor | None = None,
    scaling: float,
    slot_dropout: float | SlotDropout = 0.0,
) -> EvaRecurrence:
    """The recurrent form of `eva_attention(..., is_causal=True)` with the same options, without noise.

    Raises: UnsupportedError without a `chunk_size`: all chunks would change with every token. InputError for a
        `window_bias` that is not `[heads or 1, window_size, slots]`, and as `eva_attention`; later on for more tokens
        than a state with static shapes has room for (compiled, or on a GPU, PyTorch's error of an index).
    """
    if chunk_size is None:
        raise UnsupportedError(
            "EVA needs a chunk_size to continue from a state; got None with which the length of the sequence decides,"
            " so that every new token changes the chunks of all others. Set chunk_size, or recompute without a cache"
            " (use_cache=False)."
        )
    options = recurrent_options(window_size, chunk_size, overlap_window, chunking, max_chunks, window_bias)
    summarise = Summariser(proposals, weighting, query_map, key_map, scaling**0.5)
    summarise.check()
    return EvaRecurrence(options, summarise, scaling, window_bias, slot_dropout)


def recurrent_options(
    window_size: int,
    chunk_size: int,
    overlap_window: bool,
    chunking: str,
    max_chunks: int | None,
    window_bias: Tensor | None,
) -> ChunkOptions:
    """The layout of a recurrent form, checked."""
    if window_bias is not None and window_bias.ndim != 3:
        raise InputError(f"window_bias must be [heads or 1, window_size, slots] here; got {tuple(window_bias.shape)}.")
    side = "left" if overlap_window else None
    options = ChunkOptions(window_size, 1, chunk_size, chunking, side, is_causal=True, max_chunks=max_chunks)
    options.check(None)
    return options


@dataclass(frozen=True)
class EvaRecurrence:
    """Causal EVA a piece at a time. No method changes the state it is given. Made by `eva_recurrence`."""

    options: ChunkOptions
    summarise: MakesSummaries
    scaling: float
    window_bias: Tensor | None = None
    dropout: float | SlotDropout = 0.0

    @property
    def keeps_queries(self) -> bool:
        return self.summarise.uses_queries

    @property
    def window_shape(self) -> WindowShape:
        return WindowShape(self.options.window_size, self.options.overlap_side is not None)

    @property
    def _chunk(self) -> int:
        assert self.options.chunk_size is not None
        return self.options.chunk_size

    def start(self, key: Tensor, value: Tensor, *, static_tokens: int | None = None) -> EvaState:
        """The state before the first token, for keys and values like these.

        Args:
            static_tokens: Shapes stay the same from here on, with room for the chunks of so many tokens.
        """
        bound = self.options.max_chunks
        static_places = None if static_tokens is None else self.window_shape.places
        window = WindowTokens.empty(key, value, with_queries=self.keeps_queries, static_places=static_places)
        places = 0 if static_tokens is None else -(-static_tokens // self._chunk)
        return EvaState.empty(window, places, bound, has_spread=self.summarise.has_spread)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, state: EvaState) -> Tensor:
        """What the last tokens read, in the parallel form.

        Args:
            query: `[batch, heads, queries, head_dim]`, the last of the new tokens (all of them if `keeps_queries`).
            key, value: `[batch, heads, tokens, head_dim]`, all new tokens. key_mask: `[batch, tokens]`.
        Returns: `[batch, heads, queries, head_dim]`, dtype of `query`.
        """
        joined = state.window.join(query, key, value, key_mask)
        dtype = compute_dtype(query, joined.key, joined.value, ("cuda",))
        queries = query if joined.query is None else joined.query
        inputs = queries.to(dtype), joined.key.to(dtype), joined.value.to(dtype)
        tokens = prepare_tokens(*inputs, joined.mask, scaling=self.scaling, is_causal=True)
        estimate = eva_estimate(
            tokens,
            self.options,
            self.summarise,
            window_bias=self.window_bias,
            dropout=self.dropout,
            past=state.past(torch.promote_types(dtype, torch.float32)),
        )
        output = tokens.finish(estimate)
        return output[:, :, output.shape[2] - query.shape[2] :].to(query.dtype)

    def absorb(
        self, query: Tensor | None, key: Tensor, value: Tensor, key_mask: Tensor | None, state: EvaState
    ) -> EvaState:
        """The state after these tokens as well."""
        passed, window = state.window.move_on(query, key, value, key_mask, self.window_shape)
        if not passed.key.shape[2]:
            return replace(state, window=window)
        number = None if passed.filled is None else passed.filled // self._chunk
        fresh = self._summaries(passed.query, passed.key, passed.value)
        return state.grown(window, fresh, number, self._chunk)

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, state: EvaState, valid: Tensor | None = None
    ) -> tuple[Tensor, EvaState]:
        """One token of every row, `[batch, heads, 1, head_dim]`: `attend` and `absorb` in a few operations.

        Args:
            valid: `[batch]`, False for a row whose token is padding; static shapes only.
        """
        dtype = compute_dtype(query, key, value)
        window = state.window.append(query if self.keeps_queries else None, key, value, valid)
        logits = window.logits(query.to(dtype) * self.scaling)
        if self.window_bias is not None:
            logits = logits + self._bias(window).to(dtype)
        groups = [(logits, window.value.to(dtype))]
        x = query.to(dtype) * self.scaling**0.5
        earlier = [state.past(dtype).together(), *self._inside(window)]
        groups += [_read(x, chunks) for chunks in earlier if chunks.value.shape[2]]
        output = _joint(groups)
        state = self._pass_block(replace(state, window=window))
        if valid is not None:
            output = output.masked_fill(~valid[:, None, None, None], 0.0)
        return output.to(query.dtype), state

    # -- one token --------------------------------------------------------------------------------------------------
    def _bias(self, window: WindowTokens) -> Tensor:
        """`[batch or 1, heads or 1, 1, places]`: the bias of the last token's window at the places of its tokens."""
        assert self.window_bias is not None
        size, bias, places = self.options.window_size, self.window_bias, window.key.shape[2]
        reach = bias.shape[-1] - size
        if window.even is not None:
            place, begin = (window.even - 1) % size, reach - (window.even - 1) // size * size
            return bias[None, :, place : place + 1, begin : begin + places]
        last = (window.count() - 1).clamp_min(0)
        first = reach - last // size * size
        slot = (first[:, None] + torch.arange(places, device=first.device)).clamp_max(bias.shape[-1] - 1)
        return bias[:, (last % size)[:, None], slot].transpose(0, 1).unsqueeze(2)

    def _inside(self, window: WindowTokens) -> list[Summaries]:
        """Published: the chunks of the window's tokens before the last one's own, which it reads as well."""
        most = (window.key.shape[2] - 1) // self._chunk
        if self.options.chunking != "published" or not most:
            return []
        chunks = self._summaries(*each_of(window, lambda z: z[:, :, : most * self._chunk]))
        return [chunks if window.even is not None else chunks.first((window.count() - 1) // self._chunk)]

    def _pass_block(self, state: EvaState) -> EvaState:
        """Summarise the first block of those rows where it has left the window."""
        window, size = state.window, self.options.window_size
        rows = window.full(self.window_shape)
        if rows is not None and not rows:
            return state
        if rows is None and may_look(window.key) and not bool((window.count() == self.window_shape.places).any()):
            return state
        fresh, number = self._summaries(*each_of(window, lambda z: z[:, :, :size])), None
        if rows is None or len(rows) < window.key.shape[0]:
            number = (window.count() == self.window_shape.places).long() * (size // self._chunk)
        return state.grown(window.drop(self.window_shape), fresh, number, self._chunk)

    # -- summaries --------------------------------------------------------------------------------------------------
    def _summaries(self, query: Tensor | None, key: Tensor, value: Tensor) -> Summaries:
        """Of whole chunks, in at least float32."""
        dtype = compute_dtype(key, key, value)
        root = self.scaling**0.5
        blocks = Blocks(key.shape[2], self._chunk)
        member = torch.ones(1, blocks.num_blocks, self._chunk, dtype=torch.bool, device=key.device)
        x = query.to(dtype) * root if query is not None and self.keeps_queries else None
        chunks = Chunks(blocks.split, member, None, blocks.num_blocks)
        return self.summarise(x, key.to(dtype) * root, value.to(dtype), chunks)


def _read(x: Tensor, chunks: Summaries) -> tuple[Tensor, Tensor]:
    """Logits `[batch, heads, 1, chunks]` of scaled queries, and the chunks' values."""
    logits = x @ chunks.key_mean.transpose(-1, -2) + chunks.log_weight.unsqueeze(-2)
    if chunks.spread is not None:
        logits = logits + x.square() @ (chunks.spread / 2).transpose(-1, -2)
    return logits, chunks.value


def _joint(groups: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax over all groups of logits, applied to their values."""
    weights = torch.softmax(torch.cat([logits for logits, _ in groups], dim=-1), dim=-1)
    parts = weights.split([logits.shape[-1] for logits, _ in groups], dim=-1)
    output = parts[0] @ groups[0][1]
    for part, (_, values) in zip(parts[1:], groups[1:], strict=True):
        output = output + part @ values
    return output
