"""Decoders that also attend to an encoder: their own tokens through a state, the encoder's through keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import bert_config, largest
from decoders import BERT, GPT2, TOLERANCE, Setting, all_kinds, decoder, is_recurrent, prompt, some_kinds
from transformers import BertModel, DynamicCache, EncoderDecoderModel

OPTIONS: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "no_repeat_ngram_size": 2}


def encoder_states(batch: int = 2, tokens: int = 11) -> dict[str, torch.Tensor]:
    states = torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(6))
    mask = torch.ones(batch, tokens).long()
    mask[-1, 7:] = 0
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def encoder_decoder(setting: Setting, layers: list[int] | None = None) -> Any:
    torch.manual_seed(1)
    encoder = BertModel(bert_config(max_position_embeddings=400)).eval()
    model = EncoderDecoderModel(
        encoder=encoder, decoder=decoder(BERT, setting, layers=layers, config={"add_cross_attention": True})
    ).eval()
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


@some_kinds
def test_encoder_decoder(setting: Setting) -> None:
    model, source = encoder_decoder(setting), prompt(2, 17)
    mask = torch.ones_like(source)
    mask[1, 10:] = 0
    inputs = {"input_ids": source, "attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**inputs, **OPTIONS)
    full = model.generate(**inputs, **OPTIONS, use_cache=False)
    assert torch.equal(cached.sequences, full.sequences)
    assert largest(torch.stack(cached.logits) - torch.stack(full.logits)) < TOLERANCE
    assert len(set(cached.sequences[0].tolist())) > 5
    beams = {**OPTIONS, "num_beams": 3, "num_return_sequences": 2}
    found = model.generate(source, attention_mask=mask, **beams)
    assert torch.equal(found, model.generate(source, attention_mask=mask, **beams, use_cache=False))


@some_kinds
def test_encoder_decoder_with_a_prompt(setting: Setting) -> None:
    """A given beginning of the answer, longer than a window, and a static cache."""
    model, source, begun = encoder_decoder(setting), prompt(2, 17), prompt(2, 21, seed=4)
    options = {**OPTIONS, "decoder_input_ids": begun}
    full = model.generate(source, **options, use_cache=False)
    assert torch.equal(model.generate(source, **options), full)
    assert torch.equal(model.generate(source, **options, cache_implementation="static"), full)


@all_kinds
def test_its_cache_is_recurrent(setting: Setting) -> None:
    for layers in (None, [1]):
        model = encoder_decoder(setting, layers)
        out = model.generate(prompt(2, 9), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        assert is_recurrent(cache_of(out)) == [layers is None, True]
        assert is_recurrent(cache_of(out).cross_attention_cache) == [False, False]


@some_kinds
def test_gpt2_with_cross_attention(setting: Setting) -> None:
    model = decoder(GPT2, setting, config={"add_cross_attention": True})
    ids, states = prompt(2, 15), encoder_states()
    inputs = {"return_dict_in_generate": True, "output_logits": True, **states}
    cached = model.generate(ids, **inputs, **OPTIONS)
    full = model.generate(ids, **inputs, **OPTIONS, use_cache=False)
    assert torch.equal(cached.sequences, full.sequences)
    assert largest(torch.stack(cached.logits) - torch.stack(full.logits)) < TOLERANCE
    alone = model.generate(ids, **OPTIONS)
    assert not torch.equal(alone, full.sequences), "the encoder makes no difference: the test proves nothing"


@pytest.mark.parametrize("case", [GPT2, BERT], ids=["gpt2", "bert"])
@all_kinds
def test_pieces_with_an_encoder(setting: Setting, case: Any) -> None:
    model = decoder(case, setting, config={"add_cross_attention": True})
    ids, states = prompt(2, 30), encoder_states()
    with torch.no_grad():
        expected = model(ids, **states, use_cache=False).logits
        cache, found = None, []
        for piece in ids.split([11, 1, 1, 17], dim=1):
            out = model(piece, **states, **given_cache(cache), use_cache=True)
            cache = cache_of(out)
            found.append(out.logits)
    assert largest(torch.cat(found, dim=1) - expected) < TOLERANCE
    assert is_recurrent(cache) == [True, True]


@all_kinds
def test_without_an_encoder(setting: Setting) -> None:
    """A decoder that could attend to an encoder but is given none."""
    model, ids = decoder(GPT2, setting, config={"add_cross_attention": True}), prompt(2, 25)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = cache_of(model(ids[:, :10], use_cache=True))
        found = model(ids[:, 10:], **given_cache(cache)).logits
        own = DynamicCache(config=model.config)
        again = model(ids, **given_cache(own), use_cache=True).logits
    assert largest(found - expected[:, 10:]) < TOLERANCE
    assert largest(again - expected) < TOLERANCE
