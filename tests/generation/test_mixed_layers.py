"""Models in which some layers keep softmax: those have the stock cache of keys and values, the others a state."""

from __future__ import annotations

import pytest
import torch
from caches import cache_of, given_cache
from cases import ModelCase, largest
from decoders import (
    BERT,
    DECODERS,
    GPT2,
    KINDS,
    TOLERANCE,
    Setting,
    check_replay,
    decoder,
    is_recurrent,
    left_padded,
    prompt,
    run,
    some_kinds,
    whole_logits,
)
from transformers import DynamicCache

MIXED = [
    pytest.param(case, setting, layers, id=f"{case.name}-{setting.name}-{layers[0]}")
    for case in DECODERS
    for setting in (KINDS if case is GPT2 else (KINDS[0], KINDS[-1]))
    for layers in ([0], [1])
]
mixed = pytest.mark.parametrize(("case", "setting", "layers"), MIXED)
PADDINGS = [0, 3, 29]


@mixed
def test_generation_with_softmax_layers(case: ModelCase, setting: Setting, layers: list[int]) -> None:
    model, batch = decoder(case, setting, layers=layers), left_padded(PADDINGS, 35)
    cached, cached_logits = run(model, 14, **batch)
    check_replay(model, cached, cached_logits, PADDINGS)
    full, full_logits = run(model, 14, **batch, use_cache=False)
    assert torch.equal(cached, full)
    assert largest(cached_logits - full_logits) < TOLERANCE


@mixed
def test_only_converted_layers_have_a_state(case: ModelCase, setting: Setting, layers: list[int]) -> None:
    model, ids = decoder(case, setting, layers=layers), prompt(2, 12)
    with torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
    assert is_recurrent(cache) == [index in layers for index in (0, 1)]


@pytest.mark.parametrize("layers", [[0], [1]])
@some_kinds
def test_beams_and_pieces(setting: Setting, layers: list[int]) -> None:
    for case in (GPT2, BERT):
        model, batch = decoder(case, setting, layers=layers), left_padded([0, 10], 21)
        beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8}
        assert torch.equal(model.generate(**batch, **beams), model.generate(**batch, **beams, use_cache=False))
        ids, found, cache = prompt(2, 30), [], DynamicCache(config=model.config)
        with torch.no_grad():
            for piece in ids.split([7, 1, 1, 21], dim=1):
                found.append(model(piece, **given_cache(cache)).logits)
        assert largest(torch.cat(found, dim=1) - whole_logits(model, ids)) < TOLERANCE
