"""Decoding in half precision: the same choices as without a cache, and finite whatever the inputs' size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import given_cache
from cases import largest
from decoders import BY_NAME, GPT2, Setting, all_settings, decoder, is_recurrent, prompt, run
from torch import Tensor
from transformers import DynamicCache, StaticCache

HALVES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (torch.bfloat16, torch.float16)]


def forced(model: Any, ids: Tensor, start: int) -> Tensor:
    """Logits of given tokens: a prompt at once, then token by token."""
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for piece in (ids[:, :start], *ids[:, start:].split(1, dim=1)):
            found.append(model(piece, **given_cache(cache)).logits)
    return torch.cat(found, dim=1).float()


@pytest.mark.parametrize("dtype", HALVES)
@all_settings
def test_half_precision_chooses_the_same_tokens(setting: Setting, dtype: torch.dtype) -> None:
    """Teacher-forced: wherever the best token leads by more than rounding, it is the same one."""
    model, ids = decoder(GPT2, setting).to(dtype), prompt(3, 90)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits.float()
        exact = model.float()(ids, use_cache=False).logits
    model = model.to(dtype)
    cached = forced(model, ids, 40)
    # As far from float32 as half precision without a cache is; twice that, because each rounds on its own.
    rounding = float((whole - exact).abs().mean())
    assert float((cached - exact).abs().mean()) < 2 * rounding
    best = whole.topk(2).values
    clear = best[..., 0] - best[..., 1] > 8 * rounding
    assert float(clear.float().mean()) > 0.5
    agree = cached.argmax(-1) == whole.argmax(-1)
    assert float(agree[clear].float().mean()) >= 0.99
    assert float(agree.float().mean()) > 0.9


@pytest.mark.parametrize("dtype", HALVES)
@all_settings
def test_finite_at_large_inputs(setting: Setting, dtype: torch.dtype) -> None:
    """Embeddings and the weights of queries and keys at a hundred times their size."""
    model = decoder(GPT2, setting)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :64] *= 10  # queries and keys: logits of a hundred times the size
    model, ids = model.to(dtype), prompt(2, 60)
    embeddings = (model.get_input_embeddings()(ids) * 100).detach()
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for piece in (embeddings[:, :20], *embeddings[:, 20:50].split(1, dim=1), embeddings[:, 50:]):
            found.append(model(inputs_embeds=piece, **given_cache(cache)).logits)
    assert bool(torch.cat(found, dim=1).isfinite().all())


@pytest.mark.parametrize("name", ["favor_plus", "favor_sharp", "lara-overlap", "eva"])
def test_generates_in_half(name: str) -> None:
    model = decoder(GPT2, BY_NAME[name]).bfloat16()
    out, logits = run(model, 30, input_ids=prompt(2, 20))
    assert out.shape == (2, 50)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", ["favor_plus", "lara", "eva"])
def test_decoding_under_autocast(name: str) -> None:
    """Keys may come in another type than the cache began with: it goes on, and stays near float32."""
    model, ids = decoder(GPT2, BY_NAME[name]), prompt(2, 40)
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for piece in ids.split([20, 1, 1, 18], dim=1):
            found.append(model(piece, **given_cache(cache)).logits.float())
        whole = model(ids, use_cache=False).logits.float()
    assert largest(torch.cat(found, dim=1) - whole) < 0.2


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@all_settings
def test_slots_stay_in_float32(setting: Setting, is_static: bool) -> None:
    """A sum over thousands of tokens would stop growing in half precision."""
    model = decoder(GPT2, setting)
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        cache: Any = DynamicCache(config=model.config)
        if is_static:
            cache = StaticCache(config=model.config, max_cache_len=80)
        with torch.no_grad():
            model.to(dtype)(prompt(2, 64), **given_cache(cache))
        assert is_recurrent(cache) == [True, True]
        sizes.append(cache.layers[0].nbytes)
    assert sizes[1] <= sizes[0]
    if setting.kind != "eva":
        assert sizes[1] > 0.6 * sizes[0]
