"""Beams, samples and several sequences per prompt: the cache's rows are repeated and reordered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import ModelCase, largest
from decoders import (
    BERT,
    BY_NAME,
    GPT2,
    TOLERANCE,
    Setting,
    all_settings,
    both,
    decoder,
    left_padded,
    prompt,
    some_kinds,
)
from transformers import Cache, set_seed

BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
SAMPLES: dict[str, Any] = {"num_return_sequences": 3, "do_sample": True, "temperature": 0.8, "top_k": 20}
PADDINGS = [0, 13, 22]  # rows at different places of their windows are swapped


def both_ways(model: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences with and without a cache, from the same random numbers."""
    results = []
    for use_cache in (True, False):
        set_seed(3)
        results.append(model.generate(**options, use_cache=use_cache))
    return results[0], results[1]


@pytest.fixture
def reordered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each reordering of a cache really moved rows."""
    moved: list[bool] = []
    original = Cache.reorder_cache

    def reorder(self: Any, beam_idx: torch.Tensor) -> None:
        moved.append(not torch.equal(beam_idx.cpu(), torch.arange(len(beam_idx))))
        original(self, beam_idx)

    monkeypatch.setattr(Cache, "reorder_cache", reorder)
    return moved


@pytest.mark.compat("beams")
@all_settings
def test_beams_on_a_padded_batch(setting: Setting, reordered: list[bool]) -> None:
    model, batch = decoder(GPT2, setting), left_padded(PADDINGS, 28)
    cached, full = both_ways(model, **batch, **BEAMS, max_new_tokens=10)
    assert cached.shape[0] == 6
    assert torch.equal(cached, full)
    assert sum(reordered) > 3, "no row was moved: the test proves nothing"


@some_kinds
def test_beams_of_bert(setting: Setting, reordered: list[bool]) -> None:
    model, batch = decoder(BERT, setting), left_padded(PADDINGS, 28)
    cached, full = both_ways(model, **batch, **BEAMS, max_new_tokens=10)
    assert torch.equal(cached, full)
    assert sum(reordered) > 3


@some_kinds
def test_scores_of_beams(setting: Setting) -> None:
    """The final scores are sums of log-probabilities: a small error of a state would add up in them."""
    model, ids = decoder(GPT2, setting), prompt(2, 30)
    options = {**BEAMS, "return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 12}
    cached = model.generate(ids, **options)
    full = model.generate(ids, **options, use_cache=False)
    assert torch.equal(cached.sequences, full.sequences)
    assert largest(cached.sequences_scores - full.sequences_scores) < TOLERANCE


@some_kinds
def test_beam_sample(setting: Setting, reordered: list[bool]) -> None:
    model, batch = decoder(GPT2, setting), left_padded(PADDINGS, 28)
    options = {**BEAMS, "do_sample": True, "temperature": 1.5}
    cached, full = both_ways(model, **batch, **options, max_new_tokens=10)
    assert torch.equal(cached, full)
    assert sum(reordered) > 3


@both
@some_kinds
def test_samples_with_a_cache(case: ModelCase, setting: Setting) -> None:
    model, batch = decoder(case, setting), left_padded(PADDINGS, 28)
    cached, full = both_ways(model, **batch, **SAMPLES, max_new_tokens=10)
    assert torch.equal(cached, full)
    new = cached[:, 28:].reshape(3, 3, 10)
    assert not torch.equal(new[:, 0], new[:, 1])


@pytest.mark.parametrize("name", ["favor_plus-overlap", "lara-no-window", "eva-overlap"])
def test_samples_are_chosen_from_the_right_logits(name: str) -> None:
    model, ids = decoder(GPT2, BY_NAME[name]), prompt(2, 21)
    out = model.generate(
        ids, **{**SAMPLES, "temperature": 1.0}, max_new_tokens=20, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        expected = model(out.sequences, use_cache=False).logits[:, 20:-1]
    assert largest(torch.stack(out.logits, dim=1) - expected) < TOLERANCE


@pytest.mark.compat("beams")
@all_settings
def test_rows_of_a_cache(setting: Setting) -> None:
    """Reordering, repeating and selecting rows of a cache, each followed by a continuation."""
    model, batch = decoder(GPT2, setting), left_padded([0, 13, 6, 2], 19)
    new = prompt(8, 7, seed=9)

    def continued(rows: list[int], change: Any) -> None:
        with torch.no_grad():
            cache = cache_of(model(**batch, use_cache=True))
            change(cache)
            mask = torch.cat([batch["attention_mask"][rows], torch.ones(len(rows), 7).long()], dim=1)
            ids = torch.cat([batch["input_ids"][rows], new[: len(rows)]], dim=1)
            got = model(new[: len(rows)], **given_cache(cache), attention_mask=mask).logits
            expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -7:]
        assert largest(got - expected) < TOLERANCE

    continued([2, 2, 1, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 2, 1, 0])))
    continued([0, 0, 1, 1, 2, 2, 3, 3], lambda cache: cache.batch_repeat_interleave(2))
    continued([3, 1], lambda cache: cache.batch_select_indices(torch.tensor([3, 1])))
    continued([1, 3], lambda cache: cache.batch_select_indices(torch.tensor([False, True, False, True])))
