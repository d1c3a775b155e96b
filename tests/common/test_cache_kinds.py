"""Ways to start and to go on with generation that `tests/generation` does not have, and what `generate` returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import TOKENS, VOCAB, largest
from heads import DECODERS, Stock, convert, every_kind, inputs
from transformers import DynamicCache, GPT2LMHeadModel, StaticCache

NEW = 6
decoders = pytest.mark.parametrize("stock", DECODERS, ids=lambda cls: cls.__name__)


def generate(model: Any, **options: Any) -> Any:
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options})


@every_kind
@decoders
def test_outputs_of_generation(stock: Stock, kind: str) -> None:
    """Scores, logits and hidden states have the same shapes with a cache and without, and say the same."""
    model, ids = convert(stock, kind), inputs(stock)["input_ids"]
    options = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    found = {cached: generate(model, input_ids=ids, use_cache=cached, **options) for cached in (True, False)}
    for out in found.values():
        assert out.sequences.shape == (2, TOKENS + NEW)
        assert [tuple(score.shape) for score in out.scores] == [(2, VOCAB)] * NEW
        assert len(out.hidden_states) == NEW
        assert all(len(step) == 3 for step in out.hidden_states)
    assert torch.equal(found[True].sequences, found[False].sequences)
    for one, other in zip(found[True].logits, found[False].logits, strict=True):
        assert largest(one - other) < 1e-3
    assert [step[-1].shape[1] for step in found[True].hidden_states] == [TOKENS, *[1] * (NEW - 1)]
    with pytest.raises(ValueError, match="output_attentions"):
        generate(model, input_ids=ids, output_attentions=True)


@every_kind
@decoders
def test_without_a_prompt(stock: Stock, kind: str) -> None:
    """From the first token of the config, for one row."""
    model = convert(stock, kind)
    out = generate(model)
    assert out.sequences.shape == (1, NEW + 1)
    again = generate(model, input_ids=torch.tensor([[1]]))
    assert torch.equal(out.sequences, again.sequences)


@every_kind
@decoders
def test_from_embeddings(stock: Stock, kind: str) -> None:
    """Those of the prompt give what the prompt gives; others give something else."""
    model, ids = convert(stock, kind), inputs(stock)["input_ids"]
    expected = generate(model, input_ids=ids).sequences[:, TOKENS:]
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, inputs_embeds=embeddings).sequences, expected)
    torch.manual_seed(1)
    others = generate(model, inputs_embeds=torch.randn_like(embeddings), output_logits=True)
    assert largest(others.logits[0] - generate(model, input_ids=ids, output_logits=True).logits[0]) > 1e-3


@every_kind
@decoders
def test_continued_from_the_cache(stock: Stock, kind: str) -> None:
    """Three tokens and then three more are six tokens: from the cache of the first call, or from one given to it."""
    model, ids = convert(stock, kind), inputs(stock)["input_ids"]
    whole = generate(model, input_ids=ids).sequences
    first = generate(model, input_ids=ids, max_new_tokens=3)
    second = generate(model, input_ids=first.sequences, max_new_tokens=3, **given_cache(cache_of(first)))
    assert torch.equal(second.sequences, whole)
    own = DynamicCache(config=model.config)
    generate(model, input_ids=ids, max_new_tokens=3, **given_cache(own))
    assert torch.equal(
        generate(model, input_ids=first.sequences, max_new_tokens=3, **given_cache(own)).sequences, whole
    )


@every_kind
@decoders
def test_every_implementation_of_a_cache(stock: Stock, kind: str) -> None:
    """By name or as an object: the same tokens."""
    model, ids = convert(stock, kind), inputs(stock)["input_ids"]
    expected = generate(model, input_ids=ids, use_cache=False).sequences
    for options in (
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        given_cache(DynamicCache(config=model.config)),
        given_cache(StaticCache(config=model.config, max_cache_len=TOKENS + NEW)) | {"disable_compile": True},
    ):
        assert torch.equal(generate(model, input_ids=ids, **options).sequences, expected), options


@every_kind
@decoders
def test_positions_of_a_padded_prompt(stock: Stock, kind: str) -> None:
    """Left padding changes nothing where positions are counted from the first real token (as `generate` does)."""
    model, ids = convert(stock, kind), inputs(stock)["input_ids"][:, :20]
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), ids], 1)
    mask = (torch.arange(27) >= 7).long().expand(2, 27)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert largest(found - expected) < 1e-4


@every_kind
def test_sampling_beams_and_drafts_stay_within_the_vocabulary(kind: str) -> None:
    """Ways to choose a token, each once; `tests/generation` compares them with a model that has no cache."""
    model, ids = convert(GPT2LMHeadModel, kind), inputs(GPT2LMHeadModel)["input_ids"]
    for options in (
        {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_beams": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [6, 7]]},
    ):
        torch.manual_seed(0)
        sequences = generate(model, input_ids=ids, **options).sequences
        assert sequences.shape == (2 * options.get("num_return_sequences", 1), TOKENS + NEW)
        assert int(sequences.max()) < VOCAB
    for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
        row = ids[:1]
        found = generate(model, input_ids=row, **options).sequences
        assert torch.equal(found, generate(model, input_ids=row).sequences)


@pytest.mark.parametrize("options", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}], ids=str)
def test_ways_that_transformers_has_moved_to_the_hub(options: dict[str, Any]) -> None:
    """Contrastive search and DoLa are code of a repository now: without it, both models say so."""
    ids = inputs(GPT2LMHeadModel)["input_ids"]
    for model in (convert(GPT2LMHeadModel, "favor_plus"), convert(GPT2LMHeadModel, "eva")):
        with pytest.raises((ValueError, OSError)):
            model.generate(ids, max_new_tokens=3, **options)
