"""Settings and models that cannot work get an error that names the wrong value, what is allowed and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    BERT,
    GPT2,
    VIT,
    VOCAB,
    ModelCase,
    bert_config,
    logits,
    native,
)
from transformers import (
    BertForMaskedLM,
    BertLMHeadModel,
    T5Config,
    T5Model,
)

import hf_linattn
from hf_linattn.errors import ConfigError, LinAttnError, UnknownFieldError, UnsupportedError


# -- settings -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            "favour_plus",
            ConfigError,
            "Unknown attention kind 'favour_plus'; registered kinds: .*Did you mean 'favor_plus'",
        ),
        ("performer", ConfigError, r"registered kinds: \['eva', 'favor_plus', 'favor_sharp', 'lara'\]"),
        ({"kind": "Favor-Plus"}, ConfigError, "Did you mean 'favor_plus'"),
        ({"num_features": 8}, ConfigError, "need the key 'kind'"),
        ({"kind": ["eva"]}, ConfigError, r"must be a string; got \['eva'\]; registered kinds: \['eva'"),
        (
            {"kind": "favor_plus", "num_featurs": 8},
            UnknownFieldError,
            "no field 'num_featurs'.*Did you mean 'num_features'",
        ),
        ({"kind": "favor_plus", "num_features": 0}, ConfigError, "num_features must be an integer >= 1 .*; got 0"),
        ({"kind": "favor_plus", "num_features": 2.5}, ConfigError, "num_features must be .*got 2.5"),
        ({"kind": "favor_plus", "window_size": -1}, ConfigError, "window_size must be an integer >= 0.*got -1"),
        ({"kind": "eva", "window_size": 0}, ConfigError, "window_size"),
        ({"kind": "lara", "num_landmarks": 0}, ConfigError, "num_landmarks must be an integer >= 1 .*; got 0"),
        ({"kind": "favor_plus", "slot_dropout": 1.0}, ConfigError, "slot_dropout must be .*got 1.0"),
        ({"kind": "favor_plus", "attention_dropout": 3}, ConfigError, "from 0 to 1; got 3"),
        ({"kind": "favor_plus", "version": "1"}, LinAttnError, "must be a positive integer; got '1'"),
        (["favor_plus"], ConfigError, r"must be the name of a kind .*got \['favor_plus'\]"),
        (None, ConfigError, "must be the name of a kind .*got None"),
    ],
    ids=str,
)
def test_bad_values_of_settings(config: Any, error: type[Exception], message: str) -> None:
    model, inputs = BERT.build(), BERT.inputs()
    before = logits(model, **inputs)
    with pytest.raises(error, match=message):
        hf_linattn.convert(model, config)
    assert type(model) is BertForMaskedLM
    assert torch.equal(logits(model, **inputs), before), "a failed conversion changed the model"
    if config is not None:
        with pytest.raises(error, match=message):
            hf_linattn.LinAttnBertConfig(**{**BERT.config().to_dict(), "linear_attention": config})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], r"integers from 0 to 1; got 2 in \[2\]"),
        ([-1], r"integers from 0 to 1; got -1"),
        ([0, 0], r"name each layer once; got \[0, 0\]"),
        ([], "at least one layer, or be None for all"),
        ([0.5], "integers from 0 to 1; got 0.5"),
        ("all", "list of layer indices.*got 'all'"),
        (1, "list of layer indices.*got 1"),
    ],
    ids=str,
)
def test_bad_choices_of_layers(layers: Any, message: str) -> None:
    model = BERT.build()
    with pytest.raises(ConfigError, match=message):
        hf_linattn.convert(model, "favor_plus", layers=layers)
    assert type(model) is BertForMaskedLM


def test_settings_of_another_kind_than_the_active_one() -> None:
    model = BERT.build()
    model.config.linear_attention = {"kind": "eva"}
    model.set_attn_implementation("favor_plus")
    with pytest.raises(ConfigError, match=r"settings of 'eva', but the active attn_implementation is 'favor_plus'"):
        model(**BERT.inputs())


def test_layers_in_native_mode() -> None:
    model = native(BERT, "favor_plus")
    model.config.linear_attention = {"kind": "favor_plus", "layers": [0]}
    with pytest.raises(ConfigError, match="native mode uses the kind in every layer"):
        model(**BERT.inputs())


def test_config_of_another_class() -> None:
    config = BERT.config()
    config.linear_attention = {"kind": "favor_plus"}
    with pytest.raises(ConfigError, match="needs a LinAttnBertConfig; got BertConfig"):
        hf_linattn.LinAttnBertForMaskedLM(config)


# -- models ---------------------------------------------------------------------------------------------------------
def test_converting_twice() -> None:
    model = hf_linattn.convert(BERT.build(), BERT.settings("favor_plus"))
    before = logits(model, **BERT.inputs())
    with pytest.raises(UnsupportedError, match=r"already converted \(to 'favor_plus'\).*revert"):
        hf_linattn.convert(model, "eva")
    assert torch.equal(logits(model, **BERT.inputs()), before)
    with pytest.raises(UnsupportedError, match="needs a converted model; got BertForMaskedLM"):
        hf_linattn.revert(BERT.build())


def test_unsupported_architecture() -> None:
    small = {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": VOCAB}
    with pytest.raises(
        UnsupportedError,
        match=r"\['bert', 'gpt2', 'vit'\]; got model_type 't5'.*(bias of relative positions|computes softmax)",
    ):
        hf_linattn.convert(T5Model(T5Config(**small)), "favor_plus")


class Mine(BertForMaskedLM):
    pass


def test_subclass_of_a_stock_class() -> None:
    with pytest.raises(UnsupportedError, match="one of the classes .*'BertForMaskedLM'.*; got Mine"):
        hf_linattn.convert(Mine(BERT.config()), "favor_plus")


def test_bad_settings_of_causal_lara() -> None:
    """It needs statistics of other data, which only a converted model keeps; with landmarks it would see ahead."""
    for model in (GPT2.build(), BertLMHeadModel(bert_config(is_decoder=True))):
        before = type(model)
        for fields in ({"proposal_source": "landmarks"}, {"conventions": "published"}):
            with pytest.raises(UnsupportedError, match="no causal form.*favor_plus"):
                hf_linattn.convert(model, {"kind": "lara", **fields})
            assert type(model) is before
        model.set_attn_implementation("lara")
        with pytest.raises(
            UnsupportedError, match=r"LARA .*convert\(model, 'lara'\).*calibrate.*'favor_plus'"
        ) as error:
            model(**GPT2.inputs())
        assert "'lara'" not in str(error.value).split("Without conversion")[1]


def test_another_kind_than_converted() -> None:
    model = hf_linattn.convert(BERT.build(), "favor_plus")
    model.set_attn_implementation("eva")
    with pytest.raises(
        UnsupportedError, match="converted to 'favor_plus', but the active attn_implementation is 'eva'"
    ):
        model(**BERT.inputs())


def test_window_that_is_no_window_for_a_causal_eva() -> None:
    with pytest.raises(ConfigError, match="chunk_size"):
        hf_linattn.convert(GPT2.build(), {"kind": "eva", "window_size": 6, "chunk_size": 4})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "got NoneType.*from_pretrained"),
        (torch.nn.Linear, "got the class Linear"),
        (torch.nn.Linear(2, 2), "got Linear"),
        ("bert-base-uncased", "got str"),
        (BertForMaskedLM, "got the class BertForMaskedLM"),
    ],
    ids=str,
)
def test_convert_something_else(model: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"needs a Transformers model.*{message}"):
        hf_linattn.convert(model, "favor_plus")


def test_convert_a_wrapped_model() -> None:
    with pytest.raises(
        UnsupportedError, match=r"got DataParallel. Pass what is inside, model\.module \(a BertForMaskedLM\)"
    ):
        hf_linattn.convert(torch.nn.DataParallel(BERT.build()), "favor_plus")


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        (VIT, {"kind": "favor_plus", "overlap_window": True}, "not on images"),
        (VIT, {"kind": "lara", "overlap_window": True}, "not on images"),
        (GPT2, {"kind": "favor_plus", "num_global_tokens": 1}, "causal layer forbids"),
        (GPT2, {"kind": "eva", "num_global_tokens": 1}, "causal layer forbids"),
        (BERT, {"kind": "favor_sharp", "window_size": 3, "overlap_window": True}, "even with overlap_window"),
        (BERT, {"kind": "lara", "window_size": 5, "overlap_window": True}, "even with overlap_window"),
        (BERT, {"kind": "eva", "relative_position": "table", "relative_dims": 2}, "relative_dims must be 1"),
        (GPT2, {"kind": "eva", "relative_position": "t5", "relative_dims": 2}, "relative_dims must be 1"),
    ],
)
def test_settings_that_can_never_work_fail_at_conversion(case: ModelCase, settings: Any, message: str) -> None:
    model = case.build()
    with pytest.raises(LinAttnError, match=message):
        hf_linattn.convert(model, settings)
    assert type(model) is case.stock


@pytest.mark.parametrize("case", [BERT, VIT], ids=["bert", "vit"])
@pytest.mark.parametrize("kind", ["lara", "eva"])
def test_native_mode_has_no_parameters(kind: str, case: ModelCase) -> None:
    """Published maps end in a layer norm, which no parameter-free layer can leave out without another result."""
    model = case.build()
    model.set_attn_implementation(kind)
    model.config.linear_attention = {"kind": kind, "conventions": "published"}
    with pytest.raises(UnsupportedError, match="proposal_map='none'"):
        logits(model, **case.inputs())
    model.config.linear_attention = {"kind": kind, "conventions": "published", "proposal_map": "none"}
    assert bool(logits(model, **case.inputs()).isfinite().all())


def test_native_mode_keeps_no_statistics() -> None:
    model = BERT.build()
    for settings in (
        {"kind": "favor_sharp", "statistics": "calibrated"},
        {"kind": "lara", "proposal_source": "calibrated"},
    ):
        model.set_attn_implementation(settings["kind"])
        model.config.linear_attention = settings
        with pytest.raises(UnsupportedError, match="keeps no statistics"):
            logits(model, **BERT.inputs())
