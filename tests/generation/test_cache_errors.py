"""What a cache cannot answer raises: no continuation is silently that of another sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import given_cache
from cases import ModelCase, largest
from decoders import (
    BERT,
    GPT2,
    KINDS,
    TOLERANCE,
    Setting,
    all_kinds,
    both,
    decoder,
    left_padded,
    prompt,
    some_kinds,
)
from transformers import DynamicCache, StaticCache

import hf_linattn
from hf_linattn.errors import InputError, LinAttnError
from hf_linattn.training import redraw_projections


def filled(model: Any, tokens: int = 20, batch: int = 2) -> Any:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(batch, tokens), **given_cache(cache))
    return cache


def go_on(model: Any, cache: Any, tokens: int = 3, batch: int = 2, **options: Any) -> Any:
    with torch.no_grad():
        return model(prompt(batch, tokens, seed=8), **given_cache(cache), **options)


def go_on_twice(model: Any, cache: Any, tokens: int = 3) -> None:
    """What is wrong shows at the second forward at the latest."""
    go_on(model, cache, tokens)
    go_on(model, cache, tokens)


@both
@some_kinds
@pytest.mark.parametrize("tokens", [1, 5])
def test_softmax_in_the_middle(case: ModelCase, setting: Setting, tokens: int) -> None:
    """Softmax needs the keys of all tokens. Going back to the kind, the conversation goes on."""
    model = decoder(case, setting)
    cache = filled(model)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with pytest.raises(LinAttnError, match="attn_implementation"):
            go_on(model, cache, tokens)
    model.set_attn_implementation(setting.kind)
    ids = torch.cat([prompt(2, 20), prompt(2, tokens, seed=8)], dim=1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -tokens:]
    try:
        found = go_on(model, cache, tokens).logits
    except LinAttnError:
        return  # it may also be over
    assert largest(found - expected) < TOLERANCE


@all_kinds
@pytest.mark.parametrize("tokens", [1, 4])
def test_in_a_stock_model(setting: Setting, tokens: int) -> None:
    """A model that knows nothing of the state cannot use it: an error at the second forward at the latest."""
    model, stock = decoder(GPT2, setting), GPT2.build()
    for cache in (filled(model), DynamicCache(config=model.config)):
        with pytest.raises((LinAttnError, ValueError, RuntimeError)):
            go_on_twice(stock, cache, tokens)


@all_kinds
def test_in_a_reverted_model(setting: Setting) -> None:
    model = decoder(GPT2, setting)
    cache = filled(model)
    hf_linattn.revert(model)
    with pytest.raises(LinAttnError):
        go_on_twice(model, cache)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window": ({}, {"window_size": 16}),
    "overlap": ({}, {"overlap_window": True}),
    "seed": ({}, {"seed": 7}),
    "heads": ({"n_head": 2}, {}),
    "width": ({"n_embd": 48}, {}),
}


@all_kinds
@pytest.mark.parametrize("other", list(OTHERS))
def test_of_another_model(setting: Setting, other: str) -> None:
    config, changes = OTHERS[other]
    theirs = decoder(GPT2, Setting("other", setting.kind, changes), config=config)
    with pytest.raises((LinAttnError, RuntimeError)) as caught:
        go_on(theirs, filled(decoder(GPT2, setting)))
    assert isinstance(caught.value, InputError), f"{type(caught.value).__name__}: {caught.value}"


@all_kinds
def test_of_another_kind(setting: Setting) -> None:
    for other in KINDS:
        if other is not setting:
            with pytest.raises(LinAttnError):
                go_on(decoder(GPT2, other), filled(decoder(GPT2, setting)))


@all_kinds
def test_of_a_model_with_other_layers_converted(setting: Setting) -> None:
    """A layer's keys and values given to a layer that expects a state, and the other way round."""
    whole, first, second = (decoder(GPT2, setting, layers=layers) for layers in (None, [0], [1]))
    for model, cache in ((first, filled(second)), (first, filled(whole)), (second, filled(first))):
        with pytest.raises(LinAttnError):
            go_on_twice(model, cache)


@both
@some_kinds
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 4])
def test_cache_of_another_batch(case: ModelCase, setting: Setting, batch: int, tokens: int) -> None:
    """Neither more rows nor one row for all, which would broadcast."""
    model = decoder(case, setting)
    with pytest.raises(InputError, match="2"):
        go_on(model, filled(model), tokens, batch)


@all_kinds
def test_one_row_cache_and_a_batch(setting: Setting) -> None:
    model = decoder(GPT2, setting)
    for tokens in (1, 4):
        with pytest.raises(InputError, match="1"):
            go_on(model, filled(model, batch=1), tokens, 2)


@some_kinds
@pytest.mark.parametrize("width", [3, 20, 22, 24])
def test_mask_of_another_width(setting: Setting, width: int) -> None:
    """It covers past and new tokens. One of the new tokens alone would be ambiguous."""
    for converted_layers in (None, [0], [1]):
        model = decoder(GPT2, setting, layers=converted_layers)
        with pytest.raises(LinAttnError, match="attention_mask"):
            go_on(model, filled(model), attention_mask=torch.ones(2, width).long())


@all_kinds
def test_mask_of_pairs(setting: Setting) -> None:
    model = decoder(GPT2, setting)
    with pytest.raises(InputError, match="2-D"):
        go_on(model, filled(model), attention_mask=torch.ones(2, 1, 3, 23).bool())


@all_kinds
@pytest.mark.parametrize("layers", [None, [0], [1]])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_mask_that_changes_the_past(setting: Setting, layers: list[int] | None, tokens: int) -> None:
    """What has been absorbed cannot be masked later, and what was masked is gone."""
    model, batch = decoder(GPT2, setting, layers=layers), left_padded([0, 6], 20)
    new = torch.ones(2, tokens).long()
    past = batch["attention_mask"]
    hidden, shown = past.clone(), torch.ones_like(past)
    hidden[0, 4] = 0
    for wrong in (hidden, shown):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(**batch, **given_cache(cache))
        with pytest.raises(InputError, match="attention_mask"):
            go_on(model, cache, tokens, attention_mask=torch.cat([wrong, new], dim=1))
    cache = filled(model)
    with pytest.raises(InputError, match="attention_mask"):
        go_on(model, cache, tokens, attention_mask=torch.cat([hidden, new], dim=1))


@all_kinds
def test_another_token_masked_in_its_place(setting: Setting) -> None:
    """As many real tokens as there were, but others."""
    model, batch = decoder(GPT2, setting), left_padded([0, 6], 20)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, **given_cache(cache))
    moved = batch["attention_mask"].flip(1)
    with pytest.raises(InputError, match="attention_mask"):
        go_on(model, cache, attention_mask=torch.cat([moved, torch.ones(2, 3).long()], dim=1))


@all_kinds
def test_no_mask_after_padding(setting: Setting) -> None:
    """Without a mask all tokens count, also those that were padding: not what was read."""
    model, batch = decoder(GPT2, setting), left_padded([0, 6], 20)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, **given_cache(cache))
    with pytest.raises(InputError, match="attention_mask"):
        go_on(model, cache)


@all_kinds
def test_a_generated_padding_token(setting: Setting) -> None:
    """Continuing without a mask, where `generate` infers one from the padding token, which had been generated."""
    model, ids = decoder(GPT2, setting), prompt(2, 12)
    ids[0, 7] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **given_cache(cache))  # a real token here
    said = torch.cat([ids, prompt(2, 4, seed=3)], dim=1)
    with pytest.raises(InputError, match="attention_mask"):
        model.generate(said, **given_cache(cache), max_new_tokens=2, do_sample=False)


@all_kinds
def test_packed_sequences(setting: Setting) -> None:
    model = decoder(GPT2, setting)
    positions = torch.tensor([[20, 0, 1]]).expand(2, -1)
    with pytest.raises(InputError, match="position_ids"):
        go_on(model, filled(model), position_ids=positions)


@all_kinds
def test_a_failed_forward_is_not_forgotten(setting: Setting) -> None:
    """Layers that have read a piece and layers that have not do not go on together."""
    model = decoder(GPT2, setting)
    cache = filled(model)
    handle = model.transformer.h[1].attn.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        go_on(model, cache)
    handle.remove()
    lengths = {layer.get_seq_length() for layer in cache.layers}
    assert len(lengths) == 2, "the first layer has read the piece, the second has not"
    with pytest.raises(LinAttnError):
        go_on(model, cache)


def _interrupt(module: Any, args: Any) -> None:
    raise KeyboardInterrupt


@all_kinds
def test_after_a_refusal(setting: Setting) -> None:
    """A forward that was refused has read nothing: with the right arguments it goes on, or the cache is given up."""
    model, batch = decoder(GPT2, setting), left_padded([0, 6], 20)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 3).long()], dim=1)
    ids = torch.cat([batch["input_ids"], prompt(2, 3, seed=8)], dim=1)
    refused: list[dict[str, Any]] = [
        {},
        {"attention_mask": mask[:, 1:]},
        {"attention_mask": mask, "batch": 1},
        {"attention_mask": mask, "position_ids": torch.tensor([[5, 0, 1]])},
    ]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -3:]
        for options in refused:
            cache = DynamicCache(config=model.config)
            model(**batch, **given_cache(cache))
            with pytest.raises((LinAttnError, ValueError, RuntimeError)):
                go_on(model, cache, **options)
            try:
                found = go_on(model, cache, attention_mask=mask).logits
            except LinAttnError:
                continue
            assert largest(found - expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["favor_plus", "favor_sharp"])
def test_directions_that_change(kind: str) -> None:
    """What was summed along other directions says nothing about the new ones."""
    model = decoder(GPT2, Setting("redrawn", kind, {"redraw_interval": 10}))
    cache = filled(model)
    redraw_projections(model, 20)
    with pytest.raises(LinAttnError, match="new cache"):
        go_on(model, cache)


@all_kinds
@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_model_that_changes_its_type(setting: Setting, types: tuple[torch.dtype, torch.dtype]) -> None:
    """The text goes on in the new type, as exactly as the coarser of both."""
    model, ids = decoder(GPT2, setting), prompt(2, 30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 20:]
        cache = DynamicCache(config=model.config)
        model.to(types[0])(ids[:, :20], **given_cache(cache))
        model.to(types[1])
        found = [model(piece, **given_cache(cache)).logits.float() for piece in (ids[:, 20:21], ids[:, 21:])]
    assert largest(torch.cat(found, dim=1) - expected) < 0.2


@all_kinds
def test_too_long_for_a_static_cache(setting: Setting) -> None:
    """Where a state needs room, more tokens than there is room for raise; where it needs none they are read."""
    model, ids = decoder(GPT2, setting), prompt(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=20)

    def read() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(piece, **given_cache(cache)).logits for piece in ids.split(10, dim=1)], dim=1)

    if setting.kind == "eva":
        with pytest.raises(LinAttnError, match="20"):
            read()
        return
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert largest(read() - expected) < TOLERANCE


@all_kinds
def test_inf_in_the_padding(setting: Setting) -> None:
    """Embeddings of padding may be anything: nothing of them gets into a state."""
    model, batch = decoder(BERT, setting), left_padded([0, 11], 20)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 4).long()], dim=1)
    mask[0, 22] = 0  # later padding too
    ids = torch.cat([batch["input_ids"], prompt(2, 4)], dim=1)
    results = []
    for filler in (0.0, float("inf"), float("nan")):
        embeddings = model.get_input_embeddings()(ids).detach()
        embeddings = embeddings.masked_fill(mask[..., None] == 0, filler)
        cache, found = DynamicCache(config=model.config), []
        with torch.no_grad():
            for start, end in ((0, 9), (9, 20), (20, 21), (21, 22), (22, 23), (23, 24)):
                piece = embeddings[:, start:end]
                found.append(model(inputs_embeds=piece, **given_cache(cache), attention_mask=mask[:, :end]).logits)
        results.append(torch.cat(found, dim=1)[mask.bool()])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
