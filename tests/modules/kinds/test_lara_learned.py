"""LARA's layers with learned proposals: against the dense formula, gradients, recurrence, start, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GPT2
from helpers import MASKS, TOKENS, assert_same, inputs, random
from torch import Tensor

import hf_linattn
from hf_linattn.errors import CheckpointError, ConfigError, UncalibratedError
from hf_linattn.functional import softmax_attention
from hf_linattn.modules.base import AttentionInputs, LayerShape
from hf_linattn.modules.kinds.lara import LaraAttention, LaraConfig
from hf_linattn.ops.lara.features import mixture_log_ratio
from hf_linattn.ops.learned import LearnedFeatureMap
from hf_linattn.ops.reference import learned_reference

HEADS, SLOTS, DIM = 2, 5, 4
SCALE = DIM**-0.5
SETTINGS = {"num_global_tokens": 0, "num_landmarks": SLOTS, "learned": True}
MAPS = [name for name in LearnedFeatureMap.__dataclass_fields__ if name not in ("normalizer", "statistics", "root")]
ADAPTERS = ["query_adapter", "key_adapter"]


def build(is_causal: bool = False, **settings: Any) -> LaraAttention:
    config = LaraConfig(**{"window_size": 4, **SETTINGS, **settings})
    return LaraAttention(config, LayerShape(HEADS, DIM, 0, is_causal))


def call(mask: Tensor | None = None, is_causal: bool = False, tokens: int = TOKENS, **more: Any) -> AttentionInputs:
    return AttentionInputs(*inputs(tokens), mask, scaling=SCALE, is_causal=is_causal, **more)


def trained(layer: LaraAttention) -> dict[str, Tensor]:
    """The layer's tensors in float64, none of them at its start."""
    state = {name: tensor.detach().double() for name, tensor in layer.tensors().items()}
    parameters = dict(layer.named_parameters())
    for number, name in enumerate(sorted(parameters)):
        state[name] = random(*parameters[name].shape, seed=number, scale=0.5)
    return state


def calibrated(layer: LaraAttention) -> LaraAttention:
    calibration = layer.new_calibration()
    assert calibration is not None
    given = call(is_causal=layer.shape.is_causal)
    calibration.update(given)
    layer.set_tensors(calibration.result())
    return layer


def expected(state: dict[str, Tensor], given: AttentionInputs, **where: Any) -> Tensor:
    maps = LearnedFeatureMap(*(state[name] for name in MAPS))
    adapters = {name: state.get(name) for name in ADAPTERS}
    tokens = given.query, given.key, given.value
    where |= {"key_mask": given.key_mask, "scaling": SCALE, "is_causal": given.is_causal, "grid": given.grid}
    return learned_reference(*tokens, maps, **adapters, **where)


# -- the attention --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3, 8, 64])
@pytest.mark.parametrize("proposal_map", ["residual", "none"])
def test_is_the_dense_formula(mask: str, is_causal: bool, window: int, proposal_map: str) -> None:
    layer = build(is_causal, window_size=window, proposal_map=proposal_map)
    state, given = trained(layer), call(MASKS[mask], is_causal)
    assert ("query_adapter" in state) is (proposal_map == "residual")
    ours = layer.compute(layer.config, state, given)
    assert_same(ours, expected(state, given, window_size=window))


@pytest.mark.parametrize("window", [0, 2])
def test_on_images_with_a_global_token(window: int) -> None:
    layer = build(num_global_tokens=1, window_size=window)
    state, given = trained(layer), call(tokens=25, grid=(4, 6))
    ours = layer.compute(layer.config, state, given)
    assert_same(ours, expected(state, given, window_size=window, num_global_tokens=1))


@pytest.mark.parametrize("settings", [{"window_size": 8, "overlap_window": True}, {"num_heavy_keys": 8}])
def test_where_all_keys_are_exact_it_is_softmax(settings: dict[str, Any]) -> None:
    layer = build(**settings)
    ours = layer.compute(layer.config, trained(layer), call(tokens=8))
    assert_same(ours, softmax_attention(*inputs(8)))


@pytest.mark.parametrize(("window", "overlap"), [(0, False), (4, False), (4, True)])
def test_token_by_token(window: int, overlap: bool) -> None:
    layer = build(True, window_size=window, overlap_window=overlap)
    layer.double().set_tensors(trained(layer))
    query, key, value = inputs()
    layer.calibrated_tokens.fill_(1)
    layer._lacks_statistics = False
    whole = layer(query, key, value)
    recurrence = layer.recurrence(query, scaling=SCALE)
    state, found = recurrence.start(key, value), []
    for token in range(key.shape[2]):
        output, state = recurrence.step(*(z[:, :, token : token + 1] for z in (query, key, value)), state)
        found.append(output)
    assert_same(torch.cat(found, 2), whole)


# -- where it starts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_starts_from_the_calibrated_proposals(is_causal: bool) -> None:
    layer = build(is_causal)
    with pytest.raises(UncalibratedError, match="hf_linattn.calibrate"):
        layer(*inputs())
    calibrated(layer)
    fixed = calibrated(build(is_causal, learned=False, proposal_source="calibrated"))
    for side in ("query", "key"):
        assert torch.equal(getattr(layer, f"{side}_directions"), fixed.centroids)
        assert not getattr(layer, f"{side}_adapter").any()
    _, mixture = mixture_log_ratio(fixed.centroids, fixed.centroids)
    assert torch.equal(layer.slot_bias, -mixture)
    assert torch.equal(layer.calibrated_tokens, fixed.calibrated_tokens)
    start = layer.learning_start(call(is_causal=is_causal))
    assert set(start) == {"query_shift", "key_shift", "slot_bias", "far_offset"}
    assert start["far_offset"].any()


# -- settings -------------------------------------------------------------------------------------------------------
def test_settings_without_learned_proposals_are_as_they_were() -> None:
    assert LaraConfig().num_landmarks == 64
    assert LaraConfig(learned=True).num_landmarks == 32
    assert "learned" not in LaraConfig().to_dict()
    again = LaraConfig.from_dict(LaraConfig(learned=True).to_dict())
    assert again == LaraConfig(learned=True)
    assert set(build().tensors()) == {*MAPS, *ADAPTERS, "calibrated_tokens"}
    resolved = build().config
    assert (resolved.proposal_source, resolved.samples_per_landmark, resolved.antithetic) == ("calibrated", 1, False)
    assert resolved == LaraConfig.from_dict(resolved.to_dict())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("proposal_source", "landmarks"),
        ("proposal_map", "linear"),
        ("weighting", "optimal"),
        ("alpha_coeff", 2.0),
        ("mixing", "key"),
        ("map_stage", "tokens"),
        ("sample_noise", True),
        ("noise_scale", "published"),
        ("samples_per_landmark", 2),
        ("antithetic", True),
        ("conventions", "published"),
    ],
)
def test_fields_that_make_no_sense_with_learned_proposals(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"LaraConfig.{field} must be .* with learned=True; got {value!r}\. \w"):
        LaraConfig(learned=True, **{field: value})


def test_native_mode_has_no_learned_proposals() -> None:
    for is_causal in (False, True):
        layer = build(is_causal)
        refusal = layer.native_refusal(layer.config, layer.shape, training=False)
        assert "learns query_directions" in str(refusal)
        assert "no parameters" in str(refusal)


def test_a_checkpoint_says_which_proposals_it_has(tmp_path: Path) -> None:
    model = hf_linattn.convert(GPT2.build(), LaraConfig(num_landmarks=4, window_size=4))
    model.save_pretrained(tmp_path)
    asked = {**model.config.linear_attention, "learned": True, "samples_per_landmark": 1, "antithetic": False}
    with pytest.raises(CheckpointError, match=r"learned False in config.json"):
        type(model).from_pretrained(tmp_path, linear_attention=asked)
