"""Assisted generation, prompt lookup and cropping: tokens that were only guessed leave no trace in a state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from caches import given_cache
from cases import largest
from decoders import (
    BERT,
    GPT2,
    KINDS,
    PAD,
    SETTINGS,
    TOLERANCE,
    Setting,
    all_kinds,
    all_settings,
    decoder,
    is_recurrent,
    params,
    prompt,
    query_lengths,
    run,
    some_kinds,
    whole_logits,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from hf_linattn.errors import InputError, LinAttnError

NEW = 20


@pytest.fixture
def cropped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were taken off a cache, call by call."""
    seen: list[int] = []
    original = Cache.crop

    def crop(self: Any, tokens_to_remove: int) -> None:
        seen.append(-tokens_to_remove)
        original(self, tokens_to_remove)

    monkeypatch.setattr(Cache, "crop", crop)
    return seen


def near(model: Any, scale: float) -> Any:
    """A draft model that agrees with a model on many tokens but not on all."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))
    config = draft.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 4, "constant"
    config.assistant_confidence_threshold = 0.0  # all of them, however unsure the draft is
    return draft


def check_assisted(model: Any, cropped: list[int], tokens: int = 21, **options: Any) -> None:
    ids = options.pop("input_ids", prompt(1, tokens))
    # A draft is not given the mask: it is guessed from padding tokens, which a model without training generates too.
    inputs = {"input_ids": ids, "suppress_tokens": [PAD]}
    alone, _ = run(model, NEW, **inputs)
    with query_lengths(model) as lengths:
        assisted, _ = run(model, NEW, **inputs, **options)
    assert torch.equal(assisted, alone)
    assert any(length > 1 for length in lengths[1:]), "nothing was guessed"
    assert len(lengths) < NEW, "no guess was right: the test proves little"
    assert any(count > 0 for count in cropped), "no guess was wrong: the test proves nothing about cropping"


# Cropping itself is tested over all settings below.
FEWER = params(SETTINGS, ("favor_plus", "lara", "eva"))


@pytest.mark.parametrize("setting", FEWER)
def test_converted_draft(setting: Setting, cropped: list[int]) -> None:
    model = decoder(GPT2, setting)
    check_assisted(model, cropped, assistant_model=near(model, 0.1))


@some_kinds
def test_stock_draft_model(setting: Setting, cropped: list[int]) -> None:
    """The draft has softmax and a cache of keys and values."""
    check_assisted(decoder(GPT2, setting), cropped, assistant_model=near(GPT2.build(), 0.02))


@some_kinds
def test_stock_model_with_a_converted_draft(setting: Setting, cropped: list[int]) -> None:
    check_assisted(near(GPT2.build(), 0.02), cropped, assistant_model=decoder(GPT2, setting))


@some_kinds
def test_draft_of_bert(setting: Setting, cropped: list[int]) -> None:
    model = decoder(BERT, setting)
    check_assisted(model, cropped, assistant_model=near(model, 0.1))


@some_kinds
def test_padding_tokens_in_the_text(setting: Setting) -> None:
    """Transformers then masks, for the draft alone, a token that the draft has read: an error, or the same text."""
    model = decoder(GPT2, setting)
    with torch.no_grad():
        model.lm_head.weight[PAD] *= 3  # its favourite token
    ids = prompt(1, 15)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    alone, _ = run(model, NEW, **inputs)
    assert int((alone == PAD).sum()) > 2
    try:
        assisted, _ = run(model, NEW, **inputs, assistant_model=near(model, 0.02))
    except InputError:
        return
    assert torch.equal(assisted, alone)


def test_hopeless_draft(cropped: list[int]) -> None:
    """Nearly every guess is wrong, and many are made at once."""
    for setting in (KINDS[0], KINDS[-1]):
        model = decoder(GPT2, setting)
        draft = near(model, 3.0)
        draft.generation_config.num_assistant_tokens = 11
        inputs = {"input_ids": prompt(1, 15), "suppress_tokens": [PAD]}
        assert torch.equal(run(model, 12, **inputs, assistant_model=draft)[0], run(model, 12, **inputs)[0])
    assert max(cropped) > 8


@pytest.mark.parametrize("setting", FEWER)
def test_prompt_lookup(setting: Setting, cropped: list[int]) -> None:
    model = decoder(GPT2, setting)
    text = run(model, 30, input_ids=prompt(1, 9))[0]  # so that guesses from it are sometimes right
    check_assisted(model, cropped, input_ids=torch.cat([text, text[:, :12]], dim=1), prompt_lookup_num_tokens=6)


def test_sampling_with_a_draft() -> None:
    """It runs; what it draws follows the model's distribution, not its random numbers."""
    for setting in (KINDS[0], KINDS[-1]):
        model, ids = decoder(GPT2, setting), prompt(1, 12)
        out = model.generate(
            ids, assistant_model=near(model, 0.1), do_sample=True, max_new_tokens=8, suppress_tokens=[PAD]
        )
        assert out.shape == (1, 20)


def test_contrastive_search_is_what_transformers_makes_of_it() -> None:
    """It is code on the Hub today, for a stock model as for ours."""
    options = {"penalty_alpha": 0.6, "top_k": 4, "do_sample": False, "max_new_tokens": 4}
    messages = []
    for model in (GPT2.build(), decoder(GPT2, KINDS[0])):
        with pytest.raises(Exception, match=r".") as caught:
            model.generate(prompt(1, 8), **options)
        messages.append((caught.type, str(caught.value).split("\n")[0]))
    assert messages[0] == messages[1]


# -- cropping by hand ------------------------------------------------------------------------------------------------


def recorded(model: Any, ids: Tensor) -> Any:
    """A cache that has read tokens and is ready to be cropped."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **given_cache(cache))
    cache.activate_past_recording()
    return cache


actions = st.lists(st.tuples(st.integers(1, 14), st.integers(0, 14), st.booleans()), min_size=1, max_size=5)


@all_settings
def test_crop_takes_tokens_back(setting: Setting) -> None:
    """Tokens are added, in one forward or in several, and some taken back, again and again."""
    model = decoder(GPT2, setting)
    quick = settings(max_examples=5, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

    @quick
    @given(actions, st.integers(1, 20))
    def check(steps: list[tuple[int, int, bool]], start: int) -> None:
        said = prompt(2, start)
        cache = recorded(model, said)
        for number, (added, taken, one_by_one) in enumerate(steps):
            new = prompt(2, added, seed=40 + number)
            with torch.no_grad():
                pieces = new.split(1, dim=1) if one_by_one else [new]
                found = torch.cat([model(piece, **given_cache(cache)).logits for piece in pieces], dim=1)
            said = torch.cat([said, new], dim=1)
            assert largest(found - whole_logits(model, said)[:, -added:]) < TOLERANCE
            taken = min(taken, added)
            cache.crop(-taken)
            said = said[:, : said.shape[1] - taken]
            assert cache.get_seq_length() == said.shape[1]

    check()


@all_settings
def test_crop_keeps_the_state_small(setting: Setting) -> None:
    """What is held back until the next crop is let go of then."""
    model = decoder(GPT2, setting)
    cache = recorded(model, prompt(2, 51))
    for number in range(12):
        with torch.no_grad():
            model(prompt(2, 16, seed=number), **given_cache(cache))
        cache.crop(-8)
    straight = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(2, 51 + 12 * 8), **given_cache(straight))
    assert is_recurrent(cache) == [True, True]
    for layer, other in zip(cache.layers, straight.layers, strict=True):
        # As much as was held when the last crop came may still be there.
        assert layer.nbytes <= other.nbytes + 2 * 16 * (2 * 32 * 4)


@all_kinds
def test_crop_of_what_is_absorbed(setting: Setting) -> None:
    """Without recording nothing can be taken back; with it, no more than since the last crop."""
    model = decoder(GPT2, setting)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(2, 30), **given_cache(cache))
    with pytest.raises(LinAttnError, match="activate_past_recording"):
        cache.crop(-3)
    cache.activate_past_recording()
    with torch.no_grad():
        model(prompt(2, 5), **given_cache(cache))
    with pytest.raises(LinAttnError, match=r"30|6"):
        cache.crop(-6)


def test_crop_of_padded_rows() -> None:
    """A batch with padding, cropped in the middle of windows that are at different places."""
    for setting in KINDS:
        model = decoder(GPT2, setting)
        ids, mask = prompt(3, 40), (torch.arange(40) >= torch.tensor([0, 5, 18])[:, None]).long()
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, use_cache=False).logits
            cache = DynamicCache(config=model.config)
            model(ids[:, :19], **given_cache(cache), attention_mask=mask[:, :19])
            cache.activate_past_recording()
            for start, end in ((19, 30), (25, 36), (33, 40)):
                found = model(ids[:, start:end], **given_cache(cache), attention_mask=mask[:, :end]).logits
                assert largest(found - whole[:, start:end]) < TOLERANCE
                cache.crop({30: -5, 36: -3, 40: 0}[end])


def test_rows_while_recording() -> None:
    """Rows are picked while tokens are held that may still be taken back."""
    for setting in KINDS:
        model, ids = decoder(GPT2, setting), prompt(3, 40)
        mask = (torch.arange(40) >= torch.tensor([0, 5, 18])[:, None]).long()
        order = [2, 0, 1]
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, use_cache=False).logits
            cache = DynamicCache(config=model.config)
            model(ids[:, :19], **given_cache(cache), attention_mask=mask[:, :19])
            cache.activate_past_recording()
            model(ids[:, 19:30], **given_cache(cache), attention_mask=mask[:, :30])
            cache.reorder_cache(torch.tensor(order))
            cache.crop(-4)
            found = model(ids[order, 26:], **given_cache(cache), attention_mask=mask[order]).logits
        assert largest(found - whole[order, 26:]) < TOLERANCE


def test_the_model_itself_is_left_alone() -> None:
    """Generating changes no parameter and no buffer."""
    for setting in (KINDS[0], KINDS[-1]):
        model: nn.Module = decoder(GPT2, setting)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        run(model, 6, input_ids=prompt(1, 12), assistant_model=near(model, 0.1), suppress_tokens=[PAD])
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
