"""Attention transfer: every mistake has its message, and nothing has changed after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT
from torch import Tensor
from transfer_runs import LARA, Rows, batches, converted, short, tensors, trainer_of
from transformers import AutoModel, EncoderDecoderModel

import hf_linattn
from hf_linattn import FavorPlusConfig
from hf_linattn.conversion.ablation import ablated
from hf_linattn.errors import ConfigError, InputError, UnsupportedError
from hf_linattn.training import AttentionTransferTrainer, transfer_attention

SETTINGS = [
    ({"steps": 0}, InputError, "steps must be an integer >= 1; got 0"),
    ({"steps": True}, InputError, "steps must be"),
    ({"target": "logits"}, ConfigError, r"target must be one of \['attention', 'hidden_states'\]; got 'logits'"),
    ({"row_weight": -0.5}, ConfigError, "row_weight must be a finite number >= 0; got -0.5"),
    ({"row_weight": float("nan")}, ConfigError, "row_weight must be a finite number"),
    ({"row_weight": True}, ConfigError, "row_weight must be a finite number"),
    ({"row_weight": 0.1, "target": "hidden_states"}, ConfigError, "row_weight must be 0 with target='hidden_states'"),
    ({"learning_rate": -1e-2}, ConfigError, "learning_rate must be a finite number >= 0; got -0.01"),
    ({"learning_rate": float("nan")}, ConfigError, "learning_rate must be a finite number"),
    ({"learning_rate": "1e-2"}, ConfigError, "learning_rate must be a finite number"),
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
    ([{"input_ids": torch.ones(0, 24).long()}], r"'input_ids' of a batch is empty; got shape \(0, 24\)"),
    ([{"input_ids": batches(BERT)[0]["input_ids"].numpy()}], "must be a tensor; got ndarray"),
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


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("target", ["attention", "hidden_states"])
def test_images_that_are_not_finite(place: int, target: str) -> None:
    model, given = converted(VIT), batches(VIT)
    given[place]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        transfer_attention(model, given, steps=3, target=target)
    assert all(value.isfinite().all() for value in tensors(model).values())


def test_maps_in_float16() -> None:
    with pytest.raises(ConfigError, match=r"float16.*model\.float"):
        transfer_attention(converted(BERT).half(), batches(BERT))


def test_where_gradients_are_off() -> None:
    with torch.no_grad():
        assert transfer_attention(converted(BERT), batches(BERT), steps=1)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        transfer_attention(converted(BERT), batches(BERT))


@pytest.mark.parametrize("target", ["attention", "hidden_states"])
def test_a_model_that_runs_on_softmax_at_present(target: str) -> None:
    expected = transfer_attention(converted(BERT), batches(BERT), steps=2, target=target)
    model = converted(BERT)
    model.set_attn_implementation("sdpa")
    assert transfer_attention(model, batches(BERT), steps=2, target=target) == expected
    assert model.config._attn_implementation == "sdpa"


def test_an_ablated_model() -> None:
    model = converted(BERT)
    with ablated(model, "window_alone"), pytest.raises(ConfigError, match="outside of ablated"):
        transfer_attention(model, batches(BERT))


def test_a_part_of_another_model_whose_layers_are_not_reached() -> None:
    whole = EncoderDecoderModel(encoder=converted(BERT).bert, decoder=GPT2.build(add_cross_attention=True))
    with pytest.raises(UnsupportedError, match="2 of the layers to train were not reached"):
        transfer_attention(whole.encoder, batches(BERT))


def test_calibration_after_transfer() -> None:
    model = converted(BERT, LARA)
    hf_linattn.calibrate(model, batches(BERT))
    transfer_attention(model, batches(BERT), steps=1)
    before = tensors(model)
    with pytest.raises(ConfigError, match="have been trained"):
        hf_linattn.calibrate(model, batches(BERT))
    assert all(torch.equal(before[name], value) for name, value in tensors(model).items())


@pytest.mark.slow
def test_a_compiled_forward() -> None:
    expected, model = transfer_attention(converted(BERT), batches(BERT), steps=2), converted(BERT)
    model.forward = torch.compile(model.forward, backend="eager")
    assert transfer_attention(model, batches(BERT), steps=2) == expected


def test_an_optimizer_without_the_maps(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.optimizer = torch.optim.Adam(trainer.model.get_input_embeddings().parameters())
    with pytest.raises(ConfigError, match="lacks 14 of the 14 parameters"):
        trainer.train()


def test_an_adapter_holds_the_maps() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(converted(BERT), peft.LoraConfig(target_modules=["query"]))
    transfer_attention(model, batches(BERT), steps=1)
    assert any("linattn" in name for name in peft.get_peft_model_state_dict(model))


def test_a_comparison_of_what_is_not_finite() -> None:
    given = batches(VIT)
    given[0]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="not all finite"):
        hf_linattn.compare(converted(VIT), given)


def test_the_learning_rate_of_an_optimizer_class(tmp_path: Path) -> None:
    given = trainer_of(tmp_path)
    options = {"train_dataset": Rows(), "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})}
    optimizer = AttentionTransferTrainer(given.model, given.args, **options).create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
