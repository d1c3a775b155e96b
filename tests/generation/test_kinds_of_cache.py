"""The caches that Transformers has beside its default one: static, offloaded, quantized."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import ModelCase, largest
from decoders import (
    GPT2,
    KINDS,
    READ_QUERIES,
    STATIC_KEEPS_KEYS,
    TOLERANCE,
    Setting,
    all_kinds,
    all_settings,
    both,
    check_replay,
    decoder,
    is_recurrent,
    left_padded,
    prompt,
    run,
    static_states,
    whole_logits,
)
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache

from hf_linattn.ops.recurrent.protocol import state_tensors

PADDINGS = [0, 3, 20]


def read(model: Any, cache: Any, ids: Tensor, lengths: list[int], mask: Tensor | None = None) -> Tensor:
    found, end = [], 0
    with torch.no_grad():
        for piece in ids.split(lengths, dim=1):
            end += piece.shape[1]
            seen = None if mask is None else mask[:, :end]
            found.append(model(piece, **given_cache(cache), attention_mask=seen).logits)
    return torch.cat(found, dim=1)


@pytest.mark.compat("static")
@all_settings
def test_static_cache_generates_the_same(setting: Setting) -> None:
    """`generate` makes the mask before it calls the model, and a cache of a given length."""
    if STATIC_KEEPS_KEYS and setting.name in READ_QUERIES:
        pytest.skip("its proposals read queries, which a cache of keys does not hold")
    model, batch = decoder(GPT2, setting), left_padded(PADDINGS, 27)
    check_replay(model, *run(model, 12, **batch, cache_implementation="static"), PADDINGS)


@pytest.mark.compat("static")
@static_states
@both
@all_kinds
def test_static_is_recurrent(case: ModelCase, setting: Setting) -> None:
    model, ids = decoder(case, setting), prompt(2, 20)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(ids, cache_implementation="static", **options)
    assert is_recurrent(cache_of(out)) == [True, True]
    assert torch.equal(out.sequences, model.generate(ids, use_cache=False, **options).sequences)
    short = StaticCache(config=model.config, max_cache_len=64)
    long = StaticCache(config=model.config, max_cache_len=4096)
    read(model, short, ids, [20])
    read(model, long, ids, [20])
    bounded = setting.kind != "eva"
    for small, large in zip(short.layers, long.layers, strict=True):
        assert not bounded or small.nbytes == large.nbytes, "a state does not grow with the length it is made for"


@all_settings
def test_static_cache_by_hand(setting: Setting) -> None:
    """Pieces and steps; then `reset`, as between the requests that share a static cache."""
    model, cache = decoder(GPT2, setting), None
    cache = StaticCache(config=model.config, max_cache_len=64)
    for seed in (1, 2):
        ids = prompt(2, 40, seed=seed)
        found = read(model, cache, ids, [11, 1, 1, 1, 13, 1, 12])
        assert largest(found - whole_logits(model, ids)) < TOLERANCE
        assert int(cache.get_seq_length()) == 40
        cache.reset()
        assert int(cache.get_seq_length()) == 0


@all_settings
def test_static_tensors_stay_where_they_are(setting: Setting) -> None:
    """A captured graph reads and writes addresses."""
    model, ids = decoder(GPT2, setting), prompt(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=64)

    def places() -> list[tuple[int, torch.Size]]:
        tensors = [t for layer in cache.layers for t in state_tensors(layer.memory.state)]
        return [(t.data_ptr(), t.shape) for t in tensors]

    read(model, cache, ids[:, :11], [11])
    before = places()
    assert len(before) > 4
    read(model, cache, ids[:, 11:], [1] * 20 + [9])
    assert places() == before
    cache.reset()
    assert places() == before


@all_kinds
def test_static_beams_and_chunks(setting: Setting) -> None:
    model, batch = decoder(GPT2, setting), left_padded(PADDINGS, 27)
    static = {"cache_implementation": "static", "do_sample": False, "max_new_tokens": 8}
    beams = model.generate(**batch, **static, num_beams=2)
    assert torch.equal(beams, model.generate(**batch, do_sample=False, max_new_tokens=8, num_beams=2, use_cache=False))
    chunks = model.generate(**batch, **static, prefill_chunk_size=10)
    assert torch.equal(chunks, model.generate(**batch, do_sample=False, max_new_tokens=8, use_cache=False))


@pytest.mark.compat("static")
@static_states
@all_kinds
def test_layers_of_softmax_in_a_static_cache(setting: Setting) -> None:
    for layers in ([0], [1]):
        model, ids = decoder(GPT2, setting, layers=layers), prompt(2, 30)
        cache = StaticCache(config=model.config, max_cache_len=64)
        found = read(model, cache, ids, [11, 1, 18])
        assert largest(found - whole_logits(model, ids)) < TOLERANCE
        assert is_recurrent(cache) == [index in layers for index in (0, 1)]


@all_kinds
def test_static_cache_with_room_for_one_token_more(setting: Setting) -> None:
    """The longest text that a static cache holds."""
    model, ids = decoder(GPT2, setting), prompt(2, 20)
    cache = StaticCache(config=model.config, max_cache_len=20)
    assert largest(read(model, cache, ids, [18, 1, 1]) - whole_logits(model, ids)) < TOLERANCE


@all_settings
def test_moved_away_and_back(setting: Setting) -> None:
    """What an offloading cache does with a layer, between any two calls."""
    model, batch = decoder(GPT2, setting), left_padded([0, 13], 30)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache, found, end = DynamicCache(config=model.config), [], 0
    for layer in cache.layers:
        layer.offload()  # nothing there yet
        layer.prefetch()
    with torch.no_grad():
        for piece in ids.split([14, 1, 1, 14], dim=1):
            end += piece.shape[1]
            found.append(model(piece, **given_cache(cache), attention_mask=mask[:, :end]).logits)
            for layer in cache.layers:
                layer.offload()
                layer.prefetch()
        expected = model(**batch, use_cache=False).logits
    assert largest((torch.cat(found, dim=1) - expected)[mask.bool()]) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static", "static", "dynamic"])
@all_settings
def test_cache_on_a_device(setting: Setting, implementation: str) -> None:
    model = decoder(GPT2, setting).cuda()
    batch = {name: tensor.cuda() for name, tensor in left_padded(PADDINGS, 27).items()}
    options = {"cache_implementation": implementation, "disable_compile": True}
    check_replay(model, *run(model, 12, **batch, **options), PADDINGS)


@pytest.mark.gpu
@all_settings
def test_offloading_leaves_the_device(setting: Setting) -> None:
    model, ids = decoder(GPT2, setting).cuda(), prompt(2, 30).cuda()
    cache = DynamicCache(config=model.config, offloading=True)
    found = read(model, cache, ids, [14, 1, 15])
    assert largest(found - whole_logits(model, ids)) < TOLERANCE
    for layer in cache.layers:
        layer.offload()
        tensors = [value for value in vars(layer).values() if isinstance(value, Tensor)]
        assert all(tensor.device.type == "cpu" for tensor in tensors)


@pytest.mark.gpu
@all_kinds
def test_offloading_from_a_device_that_lags(setting: Setting) -> None:
    """Copies run on a stream of their own, and are not waited for: each has to wait for what it copies."""
    model, ids = decoder(GPT2, setting).cuda(), prompt(2, 30).cuda()
    expected = whole_logits(model, ids)
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda *_: torch.cuda._sleep(50_000_000))
    cache = DynamicCache(config=model.config, offloading=True)
    found = read(model, cache, ids[:, :20], [14, 1, 5])
    assert largest(found - expected[:, :20]) < TOLERANCE
    cache.batch_repeat_interleave(2)  # on the host, where the copies may not have arrived
    with torch.no_grad():
        rest = model(ids[:, 20:].repeat_interleave(2, 0), **given_cache(cache)).logits
    assert largest(rest - expected[:, 20:].repeat_interleave(2, 0)) < TOLERANCE


@all_kinds
def test_quantized_is_refused(setting: Setting) -> None:
    """A state is no list of keys to be quantized, and says so."""
    model = decoder(GPT2, setting)
    with pytest.raises(ValueError, match="linattn"):
        QuantizedCache("fp8", config=model.config)
    with pytest.raises(ValueError, match="linattn"):
        model.generate(prompt(1, 8), cache_implementation="quantized", max_new_tokens=2)


def test_caches_of_keys_and_values_still_work() -> None:
    """A cache that was made without the model's config, and one of stock layers."""
    for setting in KINDS:
        model, ids = decoder(GPT2, setting), prompt(2, 30)
        stock = GPT2.build()
        for cache in (DynamicCache(), DynamicCache(config=stock.config), StaticCache(stock.config, max_cache_len=64)):
            found = read(model, cache, ids, [14, 1, 15])
            assert largest(found - whole_logits(model, ids)) < TOLERANCE
            assert is_recurrent(cache) == [False, False]


def test_the_cache_of_a_reverted_model_is_the_stock_one() -> None:
    import hf_linattn

    for setting in KINDS:
        model, ids = hf_linattn.revert(decoder(GPT2, setting)), prompt(2, 20)
        with torch.no_grad():
            cache: Cache = cache_of(model(ids, use_cache=True))
        assert is_recurrent(cache) == [False, False]
        check_replay(model, *run(model, 6, input_ids=ids))


def test_another_implementation_has_the_stock_cache() -> None:
    """While a converted model runs with exact softmax, its layers are not recurrent."""
    for setting in KINDS:
        model, ids = decoder(GPT2, setting), prompt(2, 20)
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                cache = cache_of(model(ids, use_cache=True))
            assert is_recurrent(cache) == [False, False]
            check_replay(model, *run(model, 6, input_ids=ids))
        model.set_attn_implementation(setting.kind)
        with torch.no_grad():
            assert is_recurrent(cache_of(model(ids, use_cache=True))) == [True, True]


@pytest.mark.parametrize("layers", [None, [0]], ids=["all", "some"])
def test_a_cache_that_spares_sliding_layers_finds_one_to_offload(layers: list[int] | None) -> None:
    """`offloaded_static` keeps sliding layers on the device, and has to find one that is none."""
    model = decoder(GPT2, KINDS[0], layers=layers)
    cache = StaticCache(config=model.config, max_cache_len=64)
    read(model, cache, prompt(2, 20), [14, 6])
    assert is_recurrent(cache) == [True, layers is None]
    assert not all(cache.is_sliding)
    cache.prefetch_stream = contextlib.nullcontext()
    cache.prefetch(1, only_non_sliding=True)
