"""Greedy generation through the cache is what recomputing the whole sequence for every token gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import VOCAB, ModelCase, largest
from decoders import (
    BERT,
    DECODERS,
    GPT2,
    KINDS,
    SETTINGS,
    TOLERANCE,
    Setting,
    all_settings,
    both,
    check_replay,
    decoder,
    is_recurrent,
    prompt,
    query_lengths,
    run,
    whole_logits,
)
from transformers import DynamicCache

# Every setting in GPT-2; in BERT, whose attention is called another way, two kinds.
CASES = [
    pytest.param(case, setting, id=f"{case.name}-{setting.name}")
    for case in DECODERS
    for setting in (SETTINGS if case is GPT2 else (KINDS[0], KINDS[-1]))
]
ALL = [pytest.param(case, setting, id=f"{case.name}-{setting.name}") for case in DECODERS for setting in SETTINGS]


def check_greedy(case: ModelCase, setting: Setting, tokens: int, new: int) -> None:
    model, ids = decoder(case, setting), prompt(tokens=tokens)
    # No pair of tokens twice: models without training run in circles, where every cache would give the same.
    options = {"input_ids": ids, "no_repeat_ngram_size": 2}
    with query_lengths(model) as lengths:
        cached, cached_logits = run(model, new, **options)
        assert lengths == [tokens, *[1] * (new - 1)]
        lengths.clear()
        full, full_logits = run(model, new, **options, use_cache=False)
        assert lengths == list(range(tokens, tokens + new))
    assert torch.equal(cached, full)
    assert largest(cached_logits - full_logits) < TOLERANCE

    whole = whole_logits(model, cached)
    assert largest(cached_logits - whole[:, tokens - 1 : -1]) < TOLERANCE
    assert all(len(set(row.tolist())) > 8 for row in cached[:, tokens:]), "too uniform a text to prove anything"
    # The first tokens, far from any window, still count at the end.
    other = cached.clone()
    other[:, :4] = 3 + (other[:, :4] + 20) % (VOCAB - 3)
    assert largest((whole_logits(model, other) - whole)[:, -1]) > 50 * TOLERANCE


@pytest.mark.compat("cache", "no cache")
@pytest.mark.parametrize(("case", "setting"), CASES)
def test_greedy_tokens_with_and_without_cache(case: ModelCase, setting: Setting) -> None:
    check_greedy(case, setting, 45, 24)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "setting"), ALL)
def test_greedy_for_long(case: ModelCase, setting: Setting) -> None:
    check_greedy(case, setting, 150, 200)


@all_settings
def test_prompts_of_every_length(setting: Setting) -> None:
    """From one token to beyond two windows: states begin and end at every place of a window or chunk."""
    model = decoder(GPT2, setting)
    for tokens in (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17):
        check_replay(model, *run(model, 9, input_ids=prompt(2, tokens)))


@pytest.mark.compat("cache")
@both
@all_settings
def test_the_cache_is_recurrent(case: ModelCase, setting: Setting) -> None:
    """Without a word from the user: `generate`, a plain forward and `DynamicCache(config=...)`."""
    model, ids = decoder(case, setting), prompt(tokens=20)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert is_recurrent(cache_of(generated)) == [True, True]
    with torch.no_grad():
        assert is_recurrent(cache_of(model(ids, use_cache=True))) == [True, True]
        cache = DynamicCache(config=model.config)
        model(ids, **given_cache(cache))
    assert is_recurrent(cache) == [True, True]
    assert cache.get_seq_length() == 20


def state_bytes(model: Any, tokens: int, *, at_once: bool) -> list[int]:
    cache = DynamicCache(config=model.config)
    ids = prompt(2, tokens)
    with torch.no_grad():
        for piece in [ids] if at_once else ids.split(1, dim=1):
            model(piece, **given_cache(cache))
    return [layer.nbytes for layer in cache.layers]


@all_settings
def test_bytes_of_a_state(setting: Setting) -> None:
    """Constant from the first windows on; EVA's grow by a summary a chunk, unless they are bounded."""
    model = decoder(GPT2, setting)
    # At the same place of a window, where a state of growing windows would have the same size.
    early, late = state_bytes(model, 67, at_once=True), state_bytes(model, 387, at_once=True)
    assert all(size > 0 for size in early)
    if setting.kind != "eva" or "max_chunks" in setting.changes:
        assert early == late
        return
    # Of every head a key, a value, perhaps a spread, and a weight, in float32, for chunks of 4 tokens in 2 rows.
    vectors = 3 if setting.changes.get("weighting") == "spread" else 2
    expected = 2 * (387 - 67) // 4 * (vectors * 32 + 4) * 4
    assert [large - small for small, large in zip(early, late, strict=True)] == [expected] * 2


@all_settings
def test_bytes_step_by_step(setting: Setting) -> None:
    """Steps end with a state of the size that one forward gives: nothing is left behind by them."""
    model = decoder(GPT2, setting)
    assert state_bytes(model, 45, at_once=False) == state_bytes(model, 45, at_once=True)


def test_one_token_at_a_time_from_the_start() -> None:
    """No prefill at all."""
    for setting in KINDS:
        for case in (GPT2, BERT):
            model, ids = decoder(case, setting), prompt(2, 30)
            cache, parts = DynamicCache(config=model.config), []
            with torch.no_grad():
                for token in ids.split(1, dim=1):
                    parts.append(model(token, **given_cache(cache)).logits)
            assert largest(torch.cat(parts, dim=1) - whole_logits(model, ids)) < TOLERANCE
