r"""Causal attention over a sequence whose tokens are spread over processes.

A part goes on from a state, as generation does (`ops/recurrent/`): what slots, or chunks, hold of all earlier tokens,
and the tokens that its first window reaches back to. Every process takes its tokens in by itself, and what they give
is exchanged once: the state before part p is the union of what parts `0 .. p - 1` give, an exclusive prefix.

Padding is taken in as well, with keys and values 0. It comes last in a row, so no real query reads what holds it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..kernels.attention_state import AttentionState, merge_states
from ..modules.base import LinearAttention
from ..modules.contract import AttentionInputs
from ..ops.eva.bounded import merge_all
from ..ops.eva.chunks import Summaries
from ..ops.eva.recurrent import EvaRecurrence
from ..ops.eva.state import EvaState
from ..ops.precision import compute_dtype
from ..ops.recurrent.slots import SlotRecurrence, SlotState
from ..ops.recurrent.window_tokens import WindowTokens
from ..ops.softmax import mask_logits
from .collectives import SequenceGroup
from .states import from_left, states_before

Tokens = tuple[Tensor, Tensor, Tensor]  # query, key and value


def attend_causal(layer: LinearAttention[Any], inputs: AttentionInputs, group: SequenceGroup) -> Tensor:
    """`attend_across` for a causal layer."""
    recurrence = layer.recurrence(inputs.query, scaling=inputs.scaling)
    if not isinstance(recurrence, (EvaRecurrence, SlotRecurrence)):
        raise UnsupportedError(f"{type(layer).__name__} has a state of its own, which processes do not exchange.")
    mask, tokens = inputs.key_mask, _tokens(recurrence, inputs)
    shape = recurrence.window_shape
    reach = shape.size if shape.overlap else 0
    window = _window_before(recurrence, tokens, mask, reach, group)
    if isinstance(recurrence, EvaRecurrence):
        output = recurrence.attend(*tokens, mask, _chunks_before(recurrence, tokens, window, reach, group))
    else:
        output = recurrence.attend(*tokens, mask, _slots_before(recurrence, tokens, window, reach, group))
    return output.to(inputs.query.dtype)


def _tokens(recurrence: EvaRecurrence | SlotRecurrence, inputs: AttentionInputs) -> Tokens:
    """In the dtype that they are computed in, so that no state is narrower; without what stands in the padding."""
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.key_mask
    in_half = recurrence.in_half if isinstance(recurrence, SlotRecurrence) else ("cuda",)
    dtype = compute_dtype(query, key, value, in_half)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if mask is None:
        return query, key, value
    padding = ~mask[:, None, :, None]
    return query.masked_fill(padding, 0.0), key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)


def _window_before(
    recurrence: EvaRecurrence | SlotRecurrence, tokens: Tokens, mask: Tensor | None, reach: int, group: SequenceGroup
) -> WindowTokens:
    """The last `reach` tokens of the part before; the first part has none."""
    query, key, value = tokens
    if not reach:
        return WindowTokens.empty(key, value, with_queries=recurrence.keeps_queries)
    queries = group.from_left(query[:, :, -reach:]) if recurrence.keeps_queries else None
    keys, values = group.from_left(key[:, :, -reach:]), group.from_left(value[:, :, -reach:])
    # Where a row has a token here, all of those before are real; where it has none, nothing reads them.
    begins = key.new_ones(key.shape[0], dtype=torch.bool) if mask is None else mask[:, 0]
    counts = begins.long() * (reach if group.rank else 0)
    return WindowTokens(queries, keys, values, counts)


def _slots_before(
    recurrence: SlotRecurrence, tokens: Tokens, window: WindowTokens, reach: int, group: SequenceGroup
) -> SlotState:
    """What slots have read of all tokens before the window of the first query here."""
    alone = replace(recurrence, options=recurrence.options._replace(overlap_window=False))
    start, length = alone.start(*tokens[1:]), tokens[1].shape[2]

    def read(first: int, stop: int) -> AttentionState:
        query, key, value = (z[:, :, first:stop] for z in tokens)
        return alone.absorb(query, key, value, None, start).slots

    if not reach:
        return SlotState(window, merge_states(states_before(read(0, length), group)))
    # What leaves the window of the next part's first query, and what stays in it: others have both in their slots.
    passed, last = read(0, length - reach), read(length - reach, length)
    earlier = states_before(merge_states([passed, last]), group, gap=2)
    return SlotState(window, merge_states([*earlier, from_left(passed, group)]))


def _chunks_before(
    recurrence: EvaRecurrence, tokens: Tokens, window: WindowTokens, reach: int, group: SequenceGroup
) -> EvaState:
    """The summaries of all chunks before the window of the first query here."""
    options, query = recurrence.options, tokens[0] if recurrence.keeps_queries else None
    assert options.chunk_size is not None
    alone = replace(recurrence, options=replace(options, overlap_side=None, max_chunks=None))
    own, skipped = alone.absorb(query, *tokens[1:], None, alone.start(*tokens[1:])).chunks, reach // options.chunk_size
    if options.max_chunks is not None:
        own = _bounded(own, options.max_chunks + skipped)
    chunks = own.map(lambda z: group.gather(z).movedim(0, 2).flatten(2, 3))
    number = group.rank * own.value.shape[2] - skipped  # of chunks before the window
    if options.max_chunks is None:
        return EvaState(window, _first(chunks, number), (), None)
    older = merge_all(_first(_wide(chunks), number - options.max_chunks))
    places, start = _first(chunks, number).padded(options.max_chunks, 0), max(0, number)
    stop = start + options.max_chunks
    return EvaState(window, places.map(lambda z: z[:, :, start:stop]), (), older)


def _bounded(chunks: Summaries, most: int) -> Summaries:
    """The last `most` chunks, and before these one for all others, if there are any: what any later part may read."""
    others = chunks.value.shape[2] - most
    if others <= 0:
        return chunks
    older = merge_all(_wide(chunks.map(lambda z: z[:, :, :others])))
    latest = chunks.map(lambda z: z[:, :, others:])
    return latest.map(lambda z, merged: torch.cat([merged.to(z.dtype), z], -2), older)


def _wide(chunks: Summaries) -> Summaries:
    return chunks.map(lambda z: z.to(torch.promote_types(z.dtype, torch.float32)))


def _first(chunks: Summaries, number: int) -> Summaries:
    """The first `number` chunks; the others then weigh nothing."""
    is_one = torch.arange(chunks.value.shape[2], device=chunks.value.device) < number
    return replace(chunks, log_weight=mask_logits(chunks.log_weight, is_one))
