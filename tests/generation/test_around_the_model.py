"""What other libraries do around a model: hooks, checkpointing, and caches that go astray."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from caches import cache_of, given_cache
from cases import checkpoint_activations
from decoders import GPT2, KINDS, TOLERANCE, Setting, all_kinds, decoder, prompt
from transformers import DynamicCache

import hf_linattn
from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.modules.memory import CROPPABLE_TOKENS

GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}


@pytest.mark.parametrize("implementation", [None, "static"])
@all_kinds
def test_offloaded_weights(setting: Setting, implementation: str | None) -> None:
    """Accelerate moves the arguments of every module it loads, the memory among them."""
    model, ids = decoder(GPT2, setting), prompt(2, 21)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert torch.equal(offloaded.generate(ids, cache_implementation=implementation, **GREEDY), expected)


@all_kinds
def test_checkpointing_that_drops_the_cache(setting: Setting) -> None:
    model, ids = decoder(GPT2, setting), prompt(2, 30)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :20], use_cache=True))
    model.train()
    checkpoint_activations(model)
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        model(ids[:, 20:], **given_cache(cache), attention_mask=torch.ones(2, 30))
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        model(ids[:, 20:], **given_cache(cache))
    model(ids, labels=ids).loss.backward()


@all_kinds
def test_a_state_given_to_a_model_without(setting: Setting) -> None:
    """At once: a stock layer would take the new tokens for all there are."""
    model, ids = decoder(GPT2, setting), prompt(2, 30)
    stock = hf_linattn.revert(copy.deepcopy(model))
    with torch.no_grad():
        cache = cache_of(model(ids[:, :20], use_cache=True))
        for other in (stock, hf_linattn.revert(model)):
            with pytest.raises(UnsupportedError, match="holds no keys and values"):
                other(ids[:, 20:], **given_cache(cache))


@all_kinds
def test_a_cache_that_goes_on_recording(setting: Setting) -> None:
    """Prompt lookup gives back a cache that still records: what cannot be taken back any more is not kept either."""
    model = decoder(GPT2, setting, config={"n_positions": 2 * CROPPABLE_TOKENS + 500})
    ids = prompt(1, 2 * CROPPABLE_TOKENS + 400)
    found = model.generate(
        ids[:, :30], prompt_lookup_num_tokens=3, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    cache, start = cache_of(found), cache_of(found).get_seq_length()
    text = torch.cat([found.sequences[:, :start], ids[:, start:]], dim=1)
    held = []
    with torch.no_grad():
        for piece in text[:, start:].split(90, dim=1):
            last = model(piece, **given_cache(cache)).logits
            held.append(cache.layers[0].memory._pending.tokens)
        expected = model(text, use_cache=False).logits[:, -last.shape[1] :]
    assert max(held) <= 2 * CROPPABLE_TOKENS + 90
    assert float((last - expected).abs().max()) < TOLERANCE


@all_kinds
def test_cropping_with_gradients_on(setting: Setting) -> None:
    """What was read without gradients stays without: a copy of the cache can be made afterwards."""
    model, ids = decoder(GPT2, setting), prompt(2, 30)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :24], **given_cache(cache))
    cache.crop(-4)
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        found = model(ids[:, 20:], **given_cache(twin)).logits
        assert float((found - model(ids, use_cache=False).logits[:, 20:]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_a_text_longer_than_the_positions(given: str) -> None:
    """Left padding does not count where positions are given, as by `generate`."""
    model = decoder(GPT2, KINDS[0], config={"n_positions": 40})
    ids = prompt(1, 41)
    inputs = {given: ids if given == "input_ids" else model.get_input_embeddings()(ids)}
    with torch.no_grad():
        with pytest.raises(
            InputError, match=r"has 40 positions; got a text of 41 tokens.*extend_positions\(model, 64\)"
        ):
            model(**inputs)
        cache = cache_of(model(ids[:, :40], use_cache=True))
        with pytest.raises(InputError, match="got a text of 41 tokens"):
            model(ids[:, 40:], **given_cache(cache))
        padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids[:, :30]], dim=1)
        mask = (torch.arange(35) >= 5).long()[None]
        alone = model.generate(ids[:, :30], max_new_tokens=10, do_sample=False)
        assert torch.equal(
            model.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False)[:, 5:], alone
        )


def test_a_wrong_mask_can_be_corrected() -> None:
    """Refused by the first layer, before any has read: the same cache goes on with the right one."""
    model, ids = decoder(GPT2, KINDS[0]), prompt(2, 30)
    wrong = torch.ones(2, 30, dtype=torch.long)
    wrong[0, 3] = 0
    with torch.no_grad():
        cache = cache_of(model(ids[:, :20], use_cache=True))
        with pytest.raises(InputError, match="calls other tokens real"):
            model(ids[:, 20:], attention_mask=wrong, **given_cache(cache))
        found = model(ids[:, 20:], **given_cache(cache)).logits
        assert float((found - model(ids, use_cache=False).logits[:, 20:]).abs().max()) < TOLERANCE


def test_older_names_of_a_cache_layer() -> None:
    """Releases of Transformers before 5.15 crop to a length, and before that asked for the longest shape."""
    model, ids = decoder(GPT2, KINDS[0]), prompt(1, 20)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids, **given_cache(cache))
        for layer in cache.layers:
            layer.crop(15)
            assert layer.get_max_cache_shape() == -1
        found = model(ids[:, 15:], **given_cache(cache)).logits
        assert float((found - model(ids, use_cache=False).logits[:, 15:]).abs().max()) < TOLERANCE
