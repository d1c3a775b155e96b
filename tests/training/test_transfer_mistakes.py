"""Attention transfer: every mistake has its message, and nothing has changed after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BERT, GPT2
from torch import Tensor
from transfer_runs import batches, converted, short, tensors
from transformers import AutoModel, EncoderDecoderModel

import hf_linattn
from hf_linattn import FavorPlusConfig
from hf_linattn.errors import ConfigError, InputError
from hf_linattn.training import transfer_attention

SETTINGS = [
    ({"steps": 0}, InputError, "steps must be an integer >= 1; got 0"),
    ({"steps": True}, InputError, "steps must be"),
    ({"target": "logits"}, ConfigError, r"target must be one of \['attention', 'hidden_states'\]; got 'logits'"),
    ({"row_weight": -0.5}, ConfigError, "row_weight must be a finite number >= 0; got -0.5"),
    ({"row_weight": float("nan")}, ConfigError, "row_weight must be a finite number"),
    ({"row_weight": True}, ConfigError, "row_weight must be a finite number"),
    ({"row_weight": 0.1, "target": "hidden_states"}, ConfigError, "row_weight must be 0 with target='hidden_states'"),
    ({"layers": [2]}, ConfigError, "layers must be integers from 0 to 1; got 2"),
    ({"layers": [-1]}, ConfigError, "layers must be integers from 0 to 1; got -1"),
    ({"layers": [0, 0]}, ConfigError, "name each layer once"),
    ({"layers": []}, ConfigError, "at least one layer"),
    ({"layers": 1}, ConfigError, "layers must be a list"),
]


def no_real_token() -> dict[str, Tensor]:
    return {**batches(BERT)[0], "attention_mask": torch.zeros(3, 24).long()}


BATCHES: list[tuple[Any, str]] = [
    ([], "empty"),
    (iter([]), "empty"),
    (batches(BERT)[0], "Put a single batch into a list"),
    ([no_real_token()], "no real token"),
    ([short(BERT)], "fit into the window.*smaller window_size"),
]


@pytest.mark.parametrize(("options", "error", "message"), SETTINGS, ids=str)
def test_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = converted(BERT)
    before = tensors(model)
    with pytest.raises(error, match=message):
        transfer_attention(model, batches(BERT), **options)
    assert all(torch.equal(before[name], value) for name, value in tensors(model).items())


@pytest.mark.parametrize("target", ["attention", "hidden_states"])
@pytest.mark.parametrize(("given", "message"), BATCHES, ids=[message for _, message in BATCHES])
def test_batches(given: Any, message: str, target: str) -> None:
    model = converted(BERT)
    before = tensors(model)
    with pytest.raises(InputError, match=message):
        transfer_attention(model, given, target=target)
    assert all(torch.equal(before[name], value) for name, value in tensors(model).items())


@pytest.mark.parametrize("target", ["attention", "hidden_states"])
def test_a_later_batch_without_a_real_token(target: str) -> None:
    model = converted(BERT).train()
    with pytest.raises(InputError, match="no real token"):
        transfer_attention(model, [batches(BERT)[0], no_real_token()], target=target)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert "forward" not in vars(model)


def test_batches_that_end_before_the_steps() -> None:
    def once() -> Iterator[Any]:
        yield from batches(BERT)

    with pytest.raises(InputError, match="an iterator that has ended"):
        transfer_attention(converted(BERT), once(), steps=3)


def test_models_that_were_not_converted() -> None:
    with pytest.raises(ConfigError, match=r"needs a converted model; got BertForMaskedLM.*hf_linattn\.convert"):
        transfer_attention(BERT.build(), batches(BERT))
    composite = EncoderDecoderModel(encoder=converted(BERT).bert, decoder=GPT2.build(add_cross_attention=True))
    with pytest.raises(ConfigError, match=r"Pass its converted part: model\.encoder"):
        transfer_attention(composite, batches(BERT))


def test_a_teacher_that_is_linear_already() -> None:
    native = AutoModel.from_config(BERT.config(), attn_implementation="favor_plus")
    with pytest.raises(ConfigError, match=r"linear without conversion \('favor_plus'\).*hf_linattn\.convert"):
        transfer_attention(native, batches(BERT))


def test_nothing_to_train() -> None:
    plain = hf_linattn.convert(BERT.build(), FavorPlusConfig(num_features=8))
    with pytest.raises(ConfigError, match=r"anything to train by itself \(kind 'favor_plus'\).*learned=True"):
        transfer_attention(plain, batches(BERT))


def test_layers_on_softmax() -> None:
    model = converted(BERT, layers=[1])
    with pytest.raises(ConfigError, match=r"among the converted ones, \[1\]; conversion left \[0\] on softmax"):
        transfer_attention(model, batches(BERT), layers=[0, 1])
    assert transfer_attention(model, batches(BERT), steps=1)[0].layers == (1,)
