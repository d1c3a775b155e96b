"""Native mode: stock models under an attention kind, without conversion."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import (
    GPT2,
    KINDS,
    NATIVE_CAUSAL_KINDS,
    NATIVE_MATRIX,
    TOKENS,
    VIT,
    VOCAB,
    ModelCase,
    bert_config,
    checkpoint_activations,
    gpt2_config,
    largest,
    left_padded,
    logits,
    native,
    ready,
    vit_config,
)
from transformers import AutoModel, BertModel, GPT2LMHeadModel, GPT2Model, ViTModel

import hf_linattn
from hf_linattn.errors import ConfigError, UnsupportedError


@pytest.mark.compat("native")
@pytest.mark.parametrize(("kind", "case"), NATIVE_MATRIX)
def test_from_pretrained_with_a_kind(kind: str, case: ModelCase, tmp_path: Any) -> None:
    """`attn_implementation=kind` and `set_attn_implementation(kind)` agree, differ from softmax, add no parameters."""
    stock, inputs = case.build(), case.inputs()
    expected = logits(stock, **inputs)
    stock.config.linear_attention = case.settings(kind).to_dict()
    stock.save_pretrained(tmp_path)
    loaded = case.auto.from_pretrained(tmp_path, attn_implementation=kind)
    assert type(loaded) is case.stock
    assert loaded.state_dict().keys() == stock.state_dict().keys()
    got = logits(loaded, **inputs)
    assert largest(got - expected) > 1e-4
    stock.set_attn_implementation(kind)
    assert torch.equal(logits(stock, **inputs), got)
    assert torch.equal(logits(stock, **inputs), got), "the second call differs: something is drawn inside"
    stock.set_attn_implementation("sdpa")
    assert torch.equal(logits(stock, **inputs), expected)


@pytest.mark.compat("native")
@pytest.mark.parametrize(("kind", "case"), NATIVE_MATRIX)
def test_native_equals_converted_before_training(kind: str, case: ModelCase) -> None:
    """Same settings, same seeds: conversion starts from what native mode computes (but for ViT's layer index)."""
    ours, inputs = hf_linattn.convert(case.build(), case.settings(kind)), case.inputs()
    if case.name == "vit":
        second = ours.vit.layers[1].attention.linattn
        second.shape = ours.vit.layers[0].attention.linattn.shape  # native ViT layers do not know their index
        second.reset_parameters()
    for name, buffer in ours.named_buffers():
        if name.endswith("calibrated_tokens"):
            buffer.fill_(1)  # keep the neutral statistics, which are those of native mode
    assert largest(logits(ours, **inputs) - logits(native(case, kind), **inputs)) < 1e-4


def test_causal_favor_sharp_warns_once() -> None:
    hf_linattn.integrations.native._settings.cache_clear()
    model = GPT2.build()
    model.set_attn_implementation("favor_sharp")
    with pytest.warns(UserWarning, match="behaves like FAVOR\\+"):
        out = logits(model, **GPT2.inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, **GPT2.inputs())
    model.set_attn_implementation("favor_plus")
    assert largest(out - logits(model, **GPT2.inputs())) < 1e-4


def test_settings_of_native_mode() -> None:
    """They come from config.linear_attention; the seed changes the result and equal seeds agree."""
    model, inputs = GPT2.build(), GPT2.inputs()
    model.set_attn_implementation("favor_plus")
    outs = []
    for seed in (0, 1, 0):
        model.config.linear_attention = {"kind": "favor_plus", "seed": seed, "window_size": 4}
        outs.append(logits(model, **inputs))
    assert torch.equal(outs[0], outs[2])
    assert largest(outs[0] - outs[1]) > 1e-4
    for form in ("favor_plus", hf_linattn.FavorPlusConfig(), None):
        model.config.linear_attention = form
        outs.append(logits(model, **inputs))
    assert torch.equal(outs[3], outs[4])
    assert torch.equal(outs[3], outs[5])
    model.config.linear_attention = 5
    with pytest.raises(ConfigError, match=r"must be the name of a kind.*got 5"):
        model(**inputs)


def test_settings_object_can_be_saved_after_use(tmp_path: Any) -> None:
    model = GPT2.build()
    model.set_attn_implementation("favor_plus")
    model.config.linear_attention = GPT2.settings("favor_plus")
    expected = logits(model, **GPT2.inputs())
    assert model.config.linear_attention == GPT2.settings("favor_plus").to_dict()
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="favor_plus")
    assert torch.equal(logits(loaded, **GPT2.inputs()), expected)


def test_state_drawn_in_inference_mode_can_be_trained_with() -> None:
    model = BertModel(bert_config()).eval()
    model.set_attn_implementation("favor_plus")
    model.config.linear_attention = {"kind": "favor_plus", "seed": 12345}
    with torch.inference_mode():
        model(input_ids=torch.randint(3, VOCAB, (1, 10)))
    model(input_ids=torch.randint(3, VOCAB, (1, 10)))[0].sum().backward()


BASE_MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (BertModel, bert_config),
    "gpt2": (GPT2Model, gpt2_config),
    "vit": (ViTModel, vit_config),
}


@pytest.mark.parametrize(
    ("name", "kind", "is_converted"),
    [
        pytest.param(
            name,
            kind,
            is_converted,
            id=f"{'converted' if is_converted else 'native'}-{kind}-{name}",
            # By default every model with both kinds and both modes, and these with each other, but not all of each.
            marks=[]
            if kind in ("favor_plus", "eva") and is_converted == ((place + (kind == "eva")) % 2 == 0)
            else pytest.mark.slow,
        )
        for place, name in enumerate(BASE_MODELS)
        for kind in KINDS
        for is_converted in (False, True)
        if is_converted or name != "gpt2" or kind in NATIVE_CAUSAL_KINDS
    ],
)
def test_compile_without_graph_breaks(name: str, kind: str, is_converted: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    cls, config = BASE_MODELS[name]
    layers = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}  # each layer is traced anew
    model = cls(config(**layers)).eval()
    if is_converted:
        ready(hf_linattn.convert(model, kind))
    else:
        model.set_attn_implementation(kind)
    ids = torch.randint(3, VOCAB, (2, TOKENS))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    text = {"input_ids": ids, "use_cache": False}
    for inputs in (VIT.inputs(),) if name == "vit" else (text, {**text, "attention_mask": mask}):
        with torch.no_grad():
            expected = model(**inputs)[0]
            got = compiled(**inputs)[0]
        assert largest(got - expected) < 1e-5


def test_automodel_loads_every_kind_by_name(tmp_path: Any) -> None:
    GPT2LMHeadModel(gpt2_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="favour_plus"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="favour_plus")
    for kind in KINDS:
        assert AutoModel.from_pretrained(tmp_path, attn_implementation=kind).config._attn_implementation == kind


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """The mask passes through the checkpointed layers."""
    inputs = left_padded()
    gradients = []
    for checkpointing in (False, True):
        model = GPT2.build(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
        model.set_attn_implementation("favor_plus")
        if checkpointing:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].square().sum().backward()
        gradients.append(model.transformer.wte.weight.grad)
    assert largest(gradients[0] - gradients[1]) < 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "favor_sharp", "statistics": "calibrated"},
        {"kind": "lara", "proposal_source": "calibrated"},
    ],
    ids=lambda settings: settings["kind"],
)
def test_calibrated_settings_without_conversion(settings: dict[str, str]) -> None:
    """The advice is one that works: converting alone would leave a model without statistics."""
    model = BertModel(bert_config(linear_attention=settings)).eval()
    model.set_attn_implementation(settings["kind"])
    with pytest.raises(UnsupportedError, match=r"hf_linattn\.convert\) and calibrate it \(hf_linattn\.calibrate\)"):
        model(torch.randint(VOCAB, (1, TOKENS)))
