"""A sequence read in pieces, of any lengths and under any mask, gives the logits of the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import largest
from decoders import (
    BERT,
    BY_NAME,
    GPT2,
    TOLERANCE,
    Setting,
    all_kinds,
    all_settings,
    decoder,
    left_padded,
    prompt,
    run,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

TOKENS = 41
quick = settings(max_examples=12, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
thorough = settings(quick, max_examples=150)


def in_pieces(model: Any, ids: Tensor, mask: Tensor | None, cuts: list[int]) -> Tensor:
    """All logits, from a cache that is given the tokens between the cuts one piece at a time."""
    cache, found = DynamicCache(config=model.config), []
    ends = [*cuts, ids.shape[1]]
    with torch.no_grad():
        for start, end in zip([0, *cuts], ends, strict=True):
            seen = None if mask is None else mask[:, :end]
            found.append(model(ids[:, start:end], **given_cache(cache), attention_mask=seen).logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(found, dim=1)


def check_pieces(model: Any, ids: Tensor, mask: Tensor | None, cuts: list[int]) -> None:
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
    difference = in_pieces(model, ids, mask, cuts) - whole
    assert bool(difference.isfinite().all())
    # What a padding token's query gives is nobody's business.
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert largest(difference[real]) < TOLERANCE


cuts_ = st.lists(st.integers(1, TOKENS - 1), unique=True, max_size=6).map(sorted)
# Runs of steps between pieces: the two ways of computing hand over to each other.
cuts_and_steps = st.tuples(cuts_, st.integers(0, TOKENS - 1), st.integers(0, 6)).map(
    lambda drawn: sorted({*drawn[0], *range(max(drawn[1], 1), min(drawn[1] + drawn[2], TOKENS))})
)
paddings_ = st.tuples(st.integers(0, TOKENS - 1), st.integers(0, TOKENS - 1), st.integers(0, 9))
holes_ = st.lists(st.lists(st.integers(0, TOKENS - 1), max_size=25), min_size=3, max_size=3)


def split_test(model: Any, examples: settings) -> None:
    @settings(examples)
    @given(cuts_and_steps, st.one_of(st.none(), paddings_), st.one_of(st.none(), holes_), st.integers(0, 3))
    def check(cuts: list[int], paddings: Any, holes: Any, seed: int) -> None:
        ids, mask = prompt(3, TOKENS, seed=seed), None
        if paddings is not None:
            mask = left_padded(paddings, TOKENS)["attention_mask"]
        if holes is not None:
            mask = torch.ones_like(ids) if mask is None else mask
            for row, places in enumerate(holes):
                mask[row, places] = 0
            assume(bool(mask.any(-1).all()))
        check_pieces(model, ids, mask, cuts)

    check()


@all_settings
def test_prefill_in_any_pieces(setting: Setting) -> None:
    split_test(decoder(GPT2, setting), quick)


@pytest.mark.slow
@all_settings
def test_prefill_in_many_pieces(setting: Setting) -> None:
    split_test(decoder(GPT2, setting), thorough)
    split_test(decoder(BERT, setting), thorough)


@all_kinds
def test_pieces_in_bert(setting: Setting) -> None:
    mask = left_padded([0, 7, 30], TOKENS)["attention_mask"]
    mask[1, 20:24] = 0
    model, ids = decoder(BERT, setting), prompt(3, TOKENS)
    check_pieces(model, ids, mask, [3, 4, 5, 6, 21, 22, 40])
    check_pieces(model, ids, None, [8, 9, 24])


@all_kinds
def test_one_row_has_nothing_for_long(setting: Setting) -> None:
    """A row of padding alone in the first pieces, and a row whose real tokens stop for more than three windows."""
    model, ids = decoder(GPT2, setting), prompt(3, TOKENS)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    mask[2, 5:33] = 0
    for cuts in ([10, 20, 29], [10, 20, 30, 31, 32], list(range(1, TOKENS))):
        check_pieces(model, ids, mask, cuts)


@all_settings
def test_prefill_chunk_size(setting: Setting) -> None:
    model, batch = decoder(GPT2, setting), left_padded([0, 13, 5], 30)
    expected, expected_logits = run(model, 8, **batch, use_cache=False)
    for size in (7, 8):
        found, found_logits = run(model, 8, **batch, prefill_chunk_size=size)
        assert torch.equal(found, expected)
        assert largest(found_logits - expected_logits) < TOLERANCE


def by_embeddings(model: Any, ids: Tensor, cuts: list[int]) -> Tensor:
    embed, cache, found = model.get_input_embeddings(), DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            found.append(model(inputs_embeds=embed(ids[:, start:end]), **given_cache(cache)).logits)
    return torch.cat(found, dim=1)


@all_kinds
def test_embeddings_instead_of_tokens(setting: Setting) -> None:
    model, ids = decoder(GPT2, setting), prompt(2, 30)
    assert largest(by_embeddings(model, ids, [9, 10, 20]) - in_pieces(model, ids, None, [9, 10, 20])) < TOLERANCE


@pytest.mark.parametrize("name", ["favor_plus", "eva"])
def test_hidden_states_come_along(name: str) -> None:
    """`output_hidden_states` with a cache: those of the new tokens."""
    model, ids = decoder(GPT2, BY_NAME[name]), prompt(2, 20)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :11], use_cache=True))
        found = model(ids[:, 11:], **given_cache(cache), output_hidden_states=True).hidden_states
        expected = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for part, whole in zip(found, expected, strict=True):
        assert largest(part - whole[:, 11:]) < TOLERANCE
