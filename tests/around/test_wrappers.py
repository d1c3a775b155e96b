"""Functions of the library given a model inside something else: they work on it, or name the attribute to pass."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, KINDS, bert_config, converted, gpt2_config
from torch import nn
from transformers import BertModel, EncoderDecoderModel, GPT2LMHeadModel, ResNetConfig, ResNetModel
from wrapped import WRAPPERS, Own, lora, one_process

import hf_linattn
from hf_linattn import ConfigError, LinAttnError, UnsupportedError
from hf_linattn.training import redraw_projections

TEXTS = [BERT.inputs(seed=seed) for seed in (1, 2)]


@pytest.fixture(params=list(WRAPPERS))
def wrap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Callable[[Any], Any], str]]:
    make, expression = WRAPPERS[request.param]
    if request.param not in ("distributed", "accelerator"):
        yield lambda model: make(model, tmp_path), expression
        return
    with one_process():
        yield lambda model: make(model, tmp_path), expression


def encoder(kind: str = "favor_plus", **changes: Any) -> Any:
    """A converted BERT without a head."""
    torch.manual_seed(0)
    return hf_linattn.convert(BertModel(bert_config()), BERT.settings(kind, **changes)).eval()


# -- functions that read a model ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_compare_works_on_what_is_inside(wrap: tuple[Callable[[Any], Any], str], kind: str) -> None:
    wrapped = wrap[0](encoder(kind))
    inner = eval(wrap[1], {"model": wrapped})
    assert hf_linattn.compare(wrapped, TEXTS) == hf_linattn.compare(inner, TEXTS)


def test_calibrate_works_on_what_is_inside(wrap: tuple[Callable[[Any], Any], str]) -> None:
    settings = {"kind": "favor_sharp", "statistics": "calibrated"}
    wrapped = wrap[0](encoder(**settings))
    inner = eval(wrap[1], {"model": wrapped})
    alone = copy.deepcopy(inner)
    assert hf_linattn.needs_calibration(wrapped)
    assert hf_linattn.calibrate(wrapped, TEXTS) is wrapped
    assert not hf_linattn.needs_calibration(wrapped)
    want = dict(hf_linattn.calibrate(alone, TEXTS).named_buffers())
    assert all(torch.equal(buffer, want[name]) for name, buffer in inner.named_buffers())
    assert bool(torch.isfinite(inner(**TEXTS[0]).last_hidden_state).all())


def test_redraws_reach_what_is_inside(wrap: tuple[Callable[[Any], Any], str]) -> None:
    wrapped = wrap[0](encoder(redraw_interval=10))
    inner = eval(wrap[1], {"model": wrapped})
    before = inner(**TEXTS[0]).last_hidden_state
    redraw_projections(wrapped, 25)
    assert not torch.allclose(before, inner(**TEXTS[0]).last_hidden_state)


# -- functions that change a model ----------------------------------------------------------------------------------
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "convert": (lambda: BertModel(bert_config()), lambda model: hf_linattn.convert(model, "favor_plus")),
    "revert": (encoder, hf_linattn.revert),
    "extend_positions": (encoder, lambda model: hf_linattn.extend_positions(model, 100)),
}


@pytest.mark.parametrize("function", CHANGES)
def test_changes_name_the_attribute_to_pass(wrap: tuple[Callable[[Any], Any], str], function: str) -> None:
    build, change = CHANGES[function]
    model = build()
    wrapped, kind = wrap[0](model), type(model)
    with pytest.raises(UnsupportedError, match=rf"^{function}\(\) changes .*got {type(wrapped).__name__}\.") as raised:
        change(wrapped)
    told = re.search(r"Pass what is inside, (\S+) \(a (\w+)\)", str(raised.value))
    assert told is not None
    assert told[1] == wrap[1]
    assert eval(told[1], {"model": wrapped}) is model
    assert type(model) is kind  # nothing has changed
    assert ("merge_and_unload" in str(raised.value)) == ("get_base_model" in wrap[1])


@pytest.mark.parametrize("function", ["convert", "revert"])
def test_converting_a_model_with_adapters_is_refused(function: str) -> None:
    build, change = CHANGES[function]
    wrapped = lora(build())
    with pytest.raises(UnsupportedError, match=r"without adapters; got .*merge_and_unload\(\)"):
        change(wrapped.get_base_model())
    assert change(wrapped.merge_and_unload()) is not None


# -- what holds no model, or several --------------------------------------------------------------------------------
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "compare": lambda model: hf_linattn.compare(model, TEXTS),
    "calibrate": lambda model: hf_linattn.calibrate(model, TEXTS),
    "needs_calibration": hf_linattn.needs_calibration,
    "redraw_projections": lambda model: redraw_projections(model, 1),
    **{name: change for name, (_, change) in CHANGES.items()},
}
NO_MODELS: dict[str, tuple[Any, str]] = {
    "class": (BertModel, "the class BertModel"),
    "config": (bert_config(), "BertConfig"),
    "none": (None, "NoneType"),
    "name": ("bert-base-uncased", "str"),
    "models": ([encoder()], "list"),
    "state": ({}, "dict"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", NO_MODELS)
def test_wrapper_without_a_model(function: str, name: str) -> None:
    given, told = NO_MODELS[name]
    with pytest.raises(LinAttnError, match=f"got {told}"):
        FUNCTIONS[function](given)


@pytest.mark.parametrize("function", ["compare", "calibrate", *CHANGES])
def test_wrapper_of_several_models(function: str) -> None:
    pair = nn.ModuleDict({"one": encoder(), "two": encoder()})
    with pytest.raises(UnsupportedError, match=r"model\.one \(a LinAttnBertModel\), model\.two"):
        FUNCTIONS[function](pair)
    with pytest.raises(UnsupportedError, match="needs a Transformers model; got Linear"):
        FUNCTIONS[function](nn.Linear(2, 2))


@pytest.mark.parametrize("function", ["compare", "calibrate", "revert"])
def test_a_composite_model_names_its_converted_part(function: str) -> None:
    decoder = GPT2LMHeadModel(gpt2_config(add_cross_attention=True))
    decoder = hf_linattn.convert(decoder, GPT2.settings("favor_plus"))
    composite = EncoderDecoderModel(encoder=BertModel(bert_config()), decoder=decoder)
    with pytest.raises((UnsupportedError, ConfigError), match=r"model\.decoder \(a LinAttnGPT2LMHeadModel\)"):
        FUNCTIONS[function](composite)


@pytest.mark.parametrize("function", ["compare", "calibrate"])
def test_a_sharded_model_is_refused(function: str) -> None:
    class FullyShardedDataParallel(Own):  # known by its name
        pass

    with pytest.raises(UnsupportedError, match="before the model is wrapped"):
        FUNCTIONS[function](FullyShardedDataParallel(encoder()))


@pytest.mark.parametrize("kind", KINDS)
def test_compare_without_a_layer_of_ours(kind: str) -> None:
    """A report of two equal softmax runs would say that the kind is exact."""
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))
    model.config._attn_implementation = kind
    model.set_attn_implementation = lambda name: None  # type: ignore[method-assign,assignment]
    with pytest.raises(UnsupportedError, match=f"No layer of ResNetModel ran under '{kind}'"):
        hf_linattn.compare(model, [{"pixel_values": torch.zeros(1, 3, 32, 32)}])


def test_compare_says_which_layers_it_compared() -> None:
    report = hf_linattn.compare(converted(BERT, "favor_plus", layers=[1]), TEXTS)
    assert [layer.name for layer in report.layers] == ["bert.encoder.layer.1.attention.self"]
