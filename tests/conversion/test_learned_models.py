"""Models with learned maps: converted, padded, saved, reverted, adapted, and refused natively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT, ModelCase, away_from_start, largest, logits, ready
from transformers import AutoModel

import hf_linattn
from hf_linattn import EvaConfig, FavorPlusConfig, FavorSharpConfig
from hf_linattn.errors import ConfigError, LinAttnError
from hf_linattn.modules.base import LinearAttention
from hf_linattn.modules.registry import get_kind
from hf_linattn.ops.favor.statistics import FAVOR_VARIANTS
from hf_linattn.training.trained_layers import start, trained_layers
from hf_linattn.training.transfer import transfer_attention

KINDS = {
    "favor_plus": 64,
    "favor_sharp": 64,
    "lara": 64,
    "eva": 128,
}  # with their number of slots without learned maps
CASES = [BERT, GPT2, VIT]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def model_of(kind: str, case: ModelCase, **settings: Any) -> Any:
    """A converted model, calibrated where it has to be, with random values for what it learns."""
    settings = {"learned": True, get_kind(kind).size_field: 6, **settings}
    return away_from_start(hf_linattn.convert(case.build(), case.settings(kind, **settings)), case)


@pytest.mark.parametrize(
    ("kind", "case", "settings"),
    [(kind, case, {}) for kind in KINDS for case in CASES]
    + [(kind, VIT, {"value_convolution": True}) for kind in KINDS]
    + [("favor_sharp", case, {"normalizer": "kernel"}) for case in CASES],
    ids=lambda z: z if isinstance(z, str) else "-".join(z) if isinstance(z, dict) else z.name,
)
def test_saved_loaded_and_reverted(kind: str, case: ModelCase, settings: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = model_of(kind, case, **settings), case.inputs()
    expected = logits(model, **inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, **inputs), expected)
    assert loaded.config.linear_attention["learned"] is True
    assert torch.equal(logits(hf_linattn.revert(loaded), **inputs), logits(case.build(), **inputs))


@every_kind
def test_a_convolution_of_the_values_starts_as_nothing(kind: str) -> None:
    with_it, without = (
        ready_on(VIT, hf_linattn.convert(VIT.build(), VIT.settings(kind, learned=True, value_convolution=flag)))
        for flag in (True, False)
    )
    names = set(with_it.state_dict()) - set(without.state_dict())
    assert {name.rpartition(".")[2] for name in names} == {"value_convolution_weight"}
    assert torch.equal(logits(with_it, **VIT.inputs()), logits(without, **VIT.inputs()))
    transfer_attention(with_it, [VIT.inputs(4)], steps=1, learning_rate=1e-6)  # the closed form leaves it as it is
    weights = [with_it.state_dict()[name] for name in sorted(names)]
    assert all(0 < largest(weight) < 1e-5 for weight in weights)
    with torch.no_grad():
        for name in names:
            with_it.get_parameter(name).normal_()
    assert largest(logits(with_it, **VIT.inputs()) - logits(without, **VIT.inputs())) > 1e-3


@every_kind
@pytest.mark.parametrize("case", [BERT, GPT2], ids=lambda case: case.name)
def test_a_convolution_of_the_values_needs_an_image(kind: str, case: ModelCase) -> None:
    model = case.build()
    with pytest.raises(ConfigError, match="value_convolution must be False in a model of sequences; got True"):
        hf_linattn.convert(model, case.settings(kind, learned=True, value_convolution=True))
    assert type(model) is case.stock


@pytest.mark.parametrize("variant", FAVOR_VARIANTS)
@every_case
def test_sharp_with_the_kernel_starts_at_calibrated_sharp(variant: str, case: ModelCase) -> None:
    """Beside a window, where the mass of the far part counts; and again where training starts, but for the offset."""
    fields = {"num_features": 6, "variant": variant, "statistics": "calibrated"}
    plain, learned = (
        ready_on(case, hf_linattn.convert(case.build(), case.settings("favor_sharp", **fields, **more)))
        for more in ({}, {"learned": True, "normalizer": "kernel"})
    )
    expected = logits(plain, **case.inputs())
    torch.testing.assert_close(logits(learned, **case.inputs()), expected, rtol=1e-4, atol=1e-4)
    start(learned, case.inputs(4), trained_layers(learned, None))
    layers = [module for module in learned.modules() if isinstance(module, LinearAttention)]
    assert all(bool(layer.far_offset.any()) for layer in layers)
    for layer in layers:
        layer.set_tensors({"far_offset": torch.zeros_like(layer.far_offset)})
    torch.testing.assert_close(logits(learned, **case.inputs()), expected, rtol=1e-4, atol=1e-4)


def ready_on(case: ModelCase, model: Any) -> Any:
    return hf_linattn.calibrate(model, [case.inputs(4)]) if hf_linattn.needs_calibration(model) else model


@every_kind
@pytest.mark.parametrize("case", [BERT, GPT2], ids=lambda case: case.name)
def test_padding_changes_nothing(kind: str, case: ModelCase) -> None:
    model, ids = model_of(kind, case), case.inputs(1)["input_ids"]
    padded = torch.cat([ids, torch.full((1, 9), 7)], 1)
    mask = torch.ones_like(padded)
    mask[:, ids.shape[1] :] = 0
    found = logits(model, input_ids=padded, attention_mask=mask)[:, : ids.shape[1]]
    assert largest(found - logits(model, input_ids=ids)) < 1e-4


@every_kind
def test_no_token_of_a_decoder_sees_a_later_one(kind: str) -> None:
    model, ids = model_of(kind, GPT2), GPT2.inputs(1)["input_ids"]
    changed = ids.clone()
    changed[:, 25:] = 3
    assert torch.equal(logits(model, input_ids=ids)[:, :25], logits(model, input_ids=changed)[:, :25])


@every_kind
def test_every_tensor_gets_a_gradient(kind: str) -> None:
    model = model_of(kind, BERT)
    model(**BERT.inputs()).logits.square().sum().backward()
    own = {name: p.grad for name, p in model.named_parameters() if ".linattn." in name}
    assert own
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in own.values())


@every_kind
def test_native_mode_says_that_it_has_no_parameters(kind: str) -> None:
    config = BERT.config()
    config.linear_attention = {"learned": True}
    with pytest.raises(LinAttnError, match="native mode"):
        AutoModel.from_config(config, attn_implementation=kind)(**BERT.inputs())


@every_kind
def test_without_learned_maps_the_settings_are_as_they_were(kind: str) -> None:
    declared = get_kind(kind)
    settings = declared.config_cls()
    assert getattr(settings, declared.size_field) == KINDS[kind]
    assert not {"learned", "normalizer"} & set(settings.to_dict())
    assert getattr(declared.config_cls(learned=True), declared.size_field) == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FavorPlusConfig(learned=True, redraw_interval=5), "redraw_interval must be None with learned=True"),
        (lambda: FavorPlusConfig(learned=True, shared_projection=True), "Every head learns maps of its own"),
        (lambda: FavorPlusConfig(learned=True, kernel="relu"), "learned must be False with kernel='relu'"),
        (lambda: FavorPlusConfig(normalizer="kernel"), "without learned=True"),
        (lambda: FavorPlusConfig(learned=True, normalizer="slot"), "one of .*slots.*kernel"),
        (lambda: FavorSharpConfig(learned=True, statistics="row"), "'calibrated'"),
        (lambda: EvaConfig(learned=True, proposals="sum"), "proposals must be 'key' with learned=True"),
    ],
)
def test_settings_that_contradict_each_other(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_sharp_maps_start_from_the_calibrated_coordinates() -> None:
    """The first features are those of calibrated FAVOR#, up to a factor of a token and of a slot."""
    fields = {"num_features": 6, "window_size": 0, "statistics": "calibrated"}
    models = [
        hf_linattn.convert(BERT.build(), FavorSharpConfig(learned=learned, **fields)) for learned in (False, True)
    ]
    for model in models:
        hf_linattn.calibrate(model, [BERT.inputs(4)])
    plain, learned = (
        next(module for module in model.modules() if isinstance(module, LinearAttention)) for model in models
    )
    x = torch.randn(1, 4, 9, 8)
    tensors = plain.tensors()
    transform, mean = tensors["statistics_query_transform"], tensors["statistics_query_mean"]
    stretched = tensors["projection"] * (1 - 4 * tensors["statistics_shape"][0]).sqrt()
    expected = ((x - mean) @ transform) @ stretched.mT
    own = learned.tensors()
    found = (x - own["query_shift"].unsqueeze(1)) @ own["query_directions"].mT
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_adapters_keep_what_was_learned(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = model_of("favor_plus", BERT)
    settings = peft.LoraConfig(target_modules=["query"], modules_to_save=["linattn"])
    wrapped = peft.get_peft_model(model, settings)
    trained = [p for name, p in wrapped.named_parameters() if ".linattn.modules_to_save." in name]
    assert trained
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    expected = logits(wrapped, **BERT.inputs())
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model_of("favor_plus", BERT), tmp_path).eval()
    assert torch.equal(logits(loaded, **BERT.inputs()), expected)


def test_calibration_is_asked_for() -> None:
    model = hf_linattn.convert(BERT.build(), FavorSharpConfig(learned=True, num_features=6))
    assert hf_linattn.needs_calibration(model)
    assert not hf_linattn.needs_calibration(ready(model))
