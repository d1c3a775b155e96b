"""Decoding with a cache: native mode keeps Transformers' keys and values, converted models a state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import (
    CAUSAL_KINDS,
    GPT2,
    MODES,
    NATIVE_CAUSAL_KINDS,
    VOCAB,
    bert_config,
    largest,
    left_padded,
    logits,
)
from transformers import (
    BertLMHeadModel,
    StaticCache,
)

import hf_linattn

GENERATE = {"max_new_tokens": 14, "do_sample": False}


CAUSAL_CASES = [
    pytest.param(kind, *mode.values, id=f"{kind}-{mode.id}")
    for mode in MODES
    for kind in (NATIVE_CAUSAL_KINDS if mode.id == "native" else CAUSAL_KINDS)
]


@pytest.mark.compat("cache", "no cache", "static", "beams")
@pytest.mark.parametrize(("kind", "build"), CAUSAL_CASES)
def test_generate_with_a_cache(kind: str, build: Any) -> None:
    """Greedy decoding with a cache equals recomputing everything, left-padded rows equal unpadded ones."""
    model, inputs = build(GPT2, kind), left_padded()
    with torch.no_grad():
        layers = cache_of(model(**inputs, use_cache=True)).layers
    is_converted = type(model) is not GPT2.stock
    assert {type(layer).__name__ for layer in layers} == {"RecurrentLayer" if is_converted else "DynamicLayer"}

    def run(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out = model.generate(**inputs, **GENERATE, return_dict_in_generate=True, output_logits=True, **changes)
        return out.sequences, torch.stack(out.logits)

    cached, cached_logits = run()
    full, full_logits = run(use_cache=False)
    assert torch.equal(cached, full)
    assert largest(cached_logits - full_logits) < 1e-4
    static, static_logits = run(cache_implementation="static")
    assert torch.equal(static, full)
    assert largest(static_logits - full_logits) < 1e-4
    beams = {"num_beams": 2}
    assert torch.equal(run(**beams)[0], run(**beams, use_cache=False)[0])
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = model.generate(inputs["input_ids"][row, real][None], **GENERATE)
        assert torch.equal(alone[0, real.sum() :], cached[row, 20:])
    repeated = float((cached[:, 20:] == cached[:, 20:21]).float().mean())
    assert repeated < 1, "the model generates one token only: the comparison proves nothing"


@pytest.mark.compat("cache")
@pytest.mark.parametrize(("kind", "build"), CAUSAL_CASES)
def test_prefill_in_parts(kind: str, build: Any) -> None:
    """Queries are the last tokens of the keys when a prompt is continued."""
    model = build(GPT2, kind)
    ids = GPT2.inputs()["input_ids"]
    whole = logits(model, input_ids=ids)
    with torch.no_grad():
        first = model(input_ids=ids[:, :13], use_cache=True)
        second = model(input_ids=ids[:, 13:30], **given_cache(cache_of(first)), use_cache=True)
        third = model(input_ids=ids[:, 30:], **given_cache(cache_of(second)), use_cache=True)
    parts = torch.cat([first.logits, second.logits, third.logits], dim=1)
    assert largest(parts - whole) < 1e-4


def test_static_cache_without_mask() -> None:
    """Keys that the cache has room for but has not seen take no part."""
    model = GPT2.build()
    model.set_attn_implementation("favor_plus")
    ids = GPT2.inputs()["input_ids"]
    whole = logits(model, input_ids=ids)
    cache = StaticCache(config=model.config, max_cache_len=60)
    with torch.no_grad():
        first = model(input_ids=ids[:, :13], **given_cache(cache), use_cache=True).logits
        second = model(input_ids=ids[:, 13:], **given_cache(cache), use_cache=True).logits
    assert largest(torch.cat([first, second], dim=1) - whole) < 1e-4


@pytest.mark.compat("cache", "no cache")
@pytest.mark.parametrize("is_converted", [False, True], ids=["native", "converted"])
def test_bert_as_a_decoder_generates(is_converted: bool) -> None:
    """It has a decoder's defaults: EVA's proposals may not read queries, which no cache holds."""
    torch.manual_seed(0)
    model = BertLMHeadModel(bert_config(is_decoder=True, eos_token_id=None)).eval()
    if is_converted:
        hf_linattn.convert(model, "eva")
        assert model.config.linear_attention["proposals"] == "key"
    else:
        model.set_attn_implementation("eva")
    ids = torch.randint(3, VOCAB, (2, 7))
    cached = model.generate(ids, **GENERATE)
    assert torch.equal(cached, model.generate(ids, **GENERATE, use_cache=False))
