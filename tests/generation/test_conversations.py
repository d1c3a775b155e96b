"""A cache that is kept: continued, copied, saved, branched and used again."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import largest
from decoders import (
    BERT,
    GPT2,
    TOLERANCE,
    Setting,
    all_kinds,
    all_settings,
    check_replay,
    decoder,
    is_recurrent,
    left_padded,
    prompt,
    run,
    whole_logits,
)
from torch import Tensor
from transformers import DynamicCache


def answer(model: Any, ids: Tensor, cache: Any, **options: Any) -> tuple[Tensor, Any, Tensor]:
    """Sequences, cache and logits of a greedy continuation."""
    # A model without training also chooses the padding token, which a mask that `generate` infers would hide.
    options.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(
        ids,
        **given_cache(cache),
        max_new_tokens=9,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences, cache_of(out), torch.stack(out.logits, dim=1)


def advance(model: Any, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **given_cache(cache)).logits


@all_settings
def test_conversation_with_a_kept_cache(setting: Setting) -> None:
    """Three turns, each of another length, against one forward of everything said."""
    model = decoder(GPT2, setting)
    cache, said = None, torch.empty(2, 0, dtype=torch.long)
    for turn, tokens in enumerate((13, 1, 22)):
        said = torch.cat([said, prompt(2, tokens, seed=turn)], dim=1)
        said, cache, chosen_from = answer(model, said, cache)
        check_replay(model, said, chosen_from)
        # All but the token chosen last, which the model has not been given yet.
        assert cache.get_seq_length() == said.shape[1] - 1


@all_kinds
def test_conversation_of_a_padded_batch(setting: Setting) -> None:
    model, paddings = decoder(BERT, setting), [0, 11, 4]
    batch = left_padded(paddings, 17)
    said, cache, _ = answer(model, batch["input_ids"], None, attention_mask=batch["attention_mask"])
    said = torch.cat([said, prompt(3, 6, seed=7)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, said.shape[1] - 17).long()], dim=1)
    said, cache, chosen_from = answer(model, said, cache, attention_mask=mask)
    check_replay(model, said, chosen_from, paddings)


@all_kinds
def test_user_gives_the_cache(setting: Setting) -> None:
    """A `DynamicCache(config=...)` made by the user is filled in place."""
    model, ids = decoder(GPT2, setting), prompt(2, 21)
    cache = DynamicCache(config=model.config)
    said, returned, chosen_from = answer(model, ids, cache)
    assert returned is cache
    check_replay(model, said, chosen_from)
    advance(model, said[:, -1:], cache)
    more = prompt(2, 5, seed=8)
    expected = whole_logits(model, torch.cat([said, more], dim=1))[:, -5:]
    assert largest(advance(model, more, cache) - expected) < TOLERANCE


@all_settings
def test_branches_of_a_kept_cache(setting: Setting) -> None:
    """Copies of a cache go on independently of each other and of the original, in steps and in pieces."""
    model, start = decoder(GPT2, setting), prompt(2, 19)
    cache = DynamicCache(config=model.config)
    advance(model, start, cache)
    advance(model, start[:, :1], cache)  # a step, which could work in place
    said = torch.cat([start, start[:, :1]], dim=1)
    branches = [(prompt(2, 12, seed=seed), copy.deepcopy(cache)) for seed in (21, 22)]
    found: list[list[Tensor]] = [[], []]
    for step in range(4):  # in turns
        for branch, (ids, own) in enumerate(branches):
            found[branch].append(advance(model, ids[:, step : step + 1], own))
    for branch, (ids, own) in enumerate(branches):
        found[branch].append(advance(model, ids[:, 4:], own))
        expected = whole_logits(model, torch.cat([said, ids], dim=1))[:, -12:]
        assert largest(torch.cat(found[branch], dim=1) - expected) < TOLERANCE
    last = prompt(2, 3, seed=23)
    expected = whole_logits(model, torch.cat([said, last], dim=1))[:, -3:]
    assert largest(advance(model, last, cache) - expected) < TOLERANCE
    assert cache.get_seq_length() == 23


@all_settings
def test_saved_and_continued(setting: Setting) -> None:
    """Through `torch.save`, as one keeps the cache of a long prompt that many requests begin with."""
    model, batch = decoder(GPT2, setting), left_padded([0, 9], 21)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, **given_cache(cache))
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)  # noqa: TID251  # written three lines above
    assert is_recurrent(loaded) == is_recurrent(cache)
    more = prompt(2, 12, seed=4)
    ids = torch.cat([batch["input_ids"], more], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 12).long()], dim=1)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -12:]
        for own in (loaded, cache):
            pieces = [more[:, :1], more[:, 1:2], more[:, 2:]]
            found = [
                model(piece, **given_cache(own), attention_mask=mask[:, :end]).logits
                for piece, end in zip(pieces, (22, 23, 33), strict=True)
            ]
            assert largest(torch.cat(found, dim=1) - expected) < TOLERANCE


@all_settings
def test_reset_is_like_new(setting: Setting) -> None:
    """After `reset` a cache takes another text, other padding and another number of rows."""
    model = decoder(GPT2, setting)
    cache = DynamicCache(config=model.config)
    first = left_padded([0, 5, 17], 25)
    with torch.no_grad():
        model(**first, **given_cache(cache))
        model(
            prompt(3, 1),
            **given_cache(cache),
            attention_mask=torch.nn.functional.pad(first["attention_mask"], (0, 1), value=1),
        )
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = prompt(2, 30, seed=5)
    found = torch.cat([advance(model, piece, cache) for piece in ids.split([11, 1, 18], dim=1)], dim=1)
    assert largest(found - whole_logits(model, ids)) < TOLERANCE
    assert cache.get_seq_length() == 30


@all_kinds
def test_two_caches_at_once(setting: Setting) -> None:
    """A model keeps nothing of a sequence itself: two conversations in turns."""
    model, texts = decoder(GPT2, setting), [prompt(1, 24, seed=1), prompt(3, 24, seed=2)]
    caches = [DynamicCache(config=model.config) for _ in texts]
    found: list[list[Tensor]] = [[], []]
    for pieces in zip(*(ids.split([9, 1, 1, 13], dim=1) for ids in texts), strict=True):
        for own, piece, cache in zip(found, pieces, caches, strict=True):
            own.append(advance(model, piece, cache))
    for own, ids in zip(found, texts, strict=True):
        assert largest(torch.cat(own, dim=1) - whole_logits(model, ids)) < TOLERANCE


@pytest.mark.slow
@all_settings
def test_long_conversation(setting: Setting) -> None:
    model = decoder(GPT2, setting)
    cache, said = None, torch.empty(2, 0, dtype=torch.long)
    for turn in range(20):
        said = torch.cat([said, prompt(2, 1 + 5 * turn % 17, seed=turn)], dim=1)
        said, cache, chosen_from = answer(model, said, cache)
        check_replay(model, said, chosen_from)


def test_a_plain_cache_still_works() -> None:
    """`DynamicCache()` knows no model: it keeps keys and values, from which everything is computed again."""
    for name in ("favor_plus", "favor_sharp", "lara", "eva"):
        model, ids = decoder(GPT2, Setting(name, name, {})), prompt(2, 26)
        cache = DynamicCache()
        found = torch.cat([advance(model, piece, cache) for piece in ids.split([10, 1, 1, 14], dim=1)], dim=1)
        assert largest(found - whole_logits(model, ids)) < TOLERANCE
        assert is_recurrent(cache) == [False, False]
        said, _, chosen_from = answer(model, ids, DynamicCache())
        check_replay(model, said, chosen_from)
        assert run(model, 9, input_ids=ids)[0].equal(said)
