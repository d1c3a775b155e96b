"""LARA's layers: settings reach the function; calibrated layers, and the sample they are calibrated on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_linattn.errors import ConfigError, InputError, UncalibratedError, UnsupportedError
from hf_linattn.functional import lara_attention, softmax_attention
from hf_linattn.modules.base import AttentionInputs, LayerShape
from hf_linattn.modules.kinds import lara_calibration
from hf_linattn.modules.kinds.lara import LaraAttention, LaraConfig
from hf_linattn.modules.kinds.lara_calibration import ProposalCalibration
from hf_linattn.modules.proposal_maps import proposal_maps
from hf_linattn.ops.lara.proposals import sample_proposals
from hf_linattn.ops.noise import RowNoise

HEADS, DIM, TOKENS = 2, 4, 13
SCALE = DIM**-0.5


def build(is_causal: bool = False, layer_idx: int = 0, **settings: Any) -> LaraAttention:
    config = LaraConfig(**{"window_size": 4, "num_global_tokens": 0, "num_landmarks": 3, **settings})
    return LaraAttention(config, LayerShape(HEADS, DIM, layer_idx, is_causal))


def qkv(tokens: int = TOKENS, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(3)]


def call(seed: int = 0, mask: Tensor | None = None, is_causal: bool = True, **sizes: int) -> AttentionInputs:
    return AttentionInputs(*qkv(seed=seed, **sizes), mask, scaling=SCALE, is_causal=is_causal)


def calibrated(module: LaraAttention, seed: int = 5) -> LaraAttention:
    calibration = module.new_calibration()
    assert calibration is not None
    calibration.update(call(seed, is_causal=module.shape.is_causal))
    module.set_tensors(calibration.result())
    return module


def new_calibration(
    num_landmarks: int, is_causal: bool = True, stream: int = 0, **settings: Any
) -> ProposalCalibration:
    config = LaraConfig(num_landmarks=num_landmarks, **settings)
    return ProposalCalibration(config.num_landmarks, config, LayerShape(HEADS, DIM, 0, is_causal), stream)


def state_of(module: LaraAttention) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


# -- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_stage", ["mean", "tokens"])
@pytest.mark.parametrize("mixing", ["none", "key", "key_value"])
def test_settings_reach_the_function(map_stage: str, mixing: str) -> None:
    own = {"weighting": "optimal", "alpha_coeff": 2.0, "mixing": mixing, "map_stage": map_stage}
    module = build(**own, proposal_map="linear_norm", num_heavy_keys=2)
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    maps = dict(zip(("query_map", "key_map"), proposal_maps(state_of(module)), strict=True))
    shared = {**own, **maps, "num_landmarks": 3, "window_size": 4, "num_heavy_keys": 2, "offset": module.mass_offset}
    expected = lara_attention(*qkv(), **shared)
    assert torch.equal(module.eval()(*qkv()), expected)
    changes = {"alpha_coeff": 0.0, "weighting": "biased", "num_heavy_keys": 0}
    for name, value in changes.items():
        assert not torch.equal(lara_attention(*qkv(), **{**shared, name: value}), expected), name


@pytest.mark.parametrize("noise_scale", ["corrected", "published"])
def test_training_draws_samples_as_the_settings_say(noise_scale: str) -> None:
    own = {"noise_scale": noise_scale, "samples_per_landmark": 2, "antithetic": True}
    module = build(**own, sample_noise=True, proposal_map="none")
    torch.manual_seed(3)
    ours = module.train()(*qkv())
    torch.manual_seed(3)
    noise = RowNoise.drawn(qkv()[0])
    assert torch.equal(ours, lara_attention(*qkv(), num_landmarks=3, window_size=4, noise=noise, **own))
    assert torch.equal(module.eval()(*qkv()), lara_attention(*qkv(), num_landmarks=3, window_size=4))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 4])
def test_a_calibrated_layer_is_its_function(is_causal: bool, window: int) -> None:
    settings = {"proposal_source": "calibrated", "samples_per_landmark": 2, "antithetic": True, "window_size": window}
    module = build(is_causal, **settings)
    assert module.new_calibration() is not None
    with pytest.raises(UncalibratedError, match="hf_linattn.calibrate"):
        module(*qkv())
    calibrated(module)
    assert float(module.calibrated_tokens) == 2 * TOKENS
    assert set(dict(module.named_parameters())) == ({"mass_offset"} if window else set())
    if window:
        module.mass_offset.data += torch.tensor([0.3, -0.4])
    proposals = sample_proposals(module.centroids, module.proposal_noise, antithetic=True)
    assert proposals.samples.shape == (HEADS, 12, DIM)
    options = {"is_causal": is_causal, "window_size": window, "offset": state_of(module).get("mass_offset")}
    assert torch.equal(module.eval()(*qkv()), lara_attention(*qkv(), proposals=proposals, **options))
    assert torch.equal(module.train()(*qkv()), lara_attention(*qkv(), proposals=proposals, **options))


def test_where_proposals_come_from_by_default() -> None:
    assert build(False).new_calibration() is None
    assert {"query_adapter", "key_adapter", "mass_offset"} == set(state_of(build(False)))
    assert build(True).new_calibration() is not None
    assert {"centroids", "proposal_noise", "calibrated_tokens", "mass_offset"} == set(state_of(build(True)))
    assert {"centroids", "proposal_noise", "calibrated_tokens"} == set(state_of(build(True, proposal_map="none")))


def test_the_noise_is_fixed_and_of_its_layer() -> None:
    noise = build(True).proposal_noise
    assert noise.shape == (HEADS, 6, DIM)
    assert torch.equal(noise, build(True).proposal_noise)
    assert not torch.equal(noise, build(True, 1).proposal_noise)
    assert not torch.equal(noise, build(True, seed=1).proposal_noise)
    module = calibrated(build(True, sample_noise=True)).train()
    assert not torch.equal(module(*qkv()), module(*qkv()))  # drawn anew in training
    assert torch.equal(module.eval()(*qkv()), module(*qkv()))


def test_default_samples_of_calibrated_lara() -> None:
    plain, spelled = (calibrated(build(True, **own)) for own in ({}, {"samples_per_landmark": 2, "antithetic": True}))
    assert torch.equal(plain(*qkv()), spelled(*qkv()))
    for own in ({"samples_per_landmark": 1}, {"antithetic": False}):
        assert not torch.equal(calibrated(build(True, **own))(*qkv()), plain(*qkv()))


def test_layers_that_cannot_work_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no causal form with landmarks.*hf_linattn.calibrate"):
        build(True, proposal_source="landmarks")
    with pytest.raises(UnsupportedError, match="Heavy keys.*num_heavy_keys=2"):
        build(True, num_heavy_keys=2)
    with pytest.raises(UnsupportedError, match="conventions='published'"):
        build(True, conventions="published")
    for field, value in {"weighting": "optimal", "mixing": "key", "noise_scale": "published"}.items():
        for causal in (False, True):
            with pytest.raises(UnsupportedError, match=f"{field} must be.*{value}"):
                build(causal, proposal_source="calibrated", **{field: value})
    for field, value in {
        "alpha_coeff": -1.0,
        "mixing": "keys",
        "map_stage": "token",
        "samples_per_landmark": 0,
        "antithetic": 1,
        "num_heavy_keys": -1,
        "proposal_source": "landmark",
        "weighting": "size",
    }.items():
        with pytest.raises(ConfigError, match=f"LaraConfig.{field} must be"):
            LaraConfig(**{field: value})
    with pytest.raises(ConfigError, match="alpha_coeff must be a finite number"):
        LaraConfig(alpha_coeff=float("inf"))


# -- calibration ----------------------------------------------------------------------------------------------------


def means(inputs: AttentionInputs, row: int, places: list[int]) -> Tensor:
    """`x_t + sum_n softmax_n(x_t . y_n) y_n` over the tokens `places` of one row, `[heads, tokens, dim]`."""
    q, k = inputs.query[row : row + 1, :, places], inputs.key[row : row + 1, :, places]
    return ((q + softmax_attention(q, k, k, is_causal=inputs.is_causal)) * SCALE**0.5)[0]


def matches(points: Tensor, seen: Tensor) -> list[int]:
    """Which of the points `seen` `[heads, points, dim]` each of `points` is."""
    distance, index = torch.cdist(*(z.transpose(0, 1).flatten(1).double() for z in (points, seen))).min(-1)
    assert (distance < 1e-4).all()
    return index.tolist()


def assert_same_points(state: dict[str, Tensor], expected: Tensor) -> None:
    """In whatever order."""
    filled = state["priorities"] > float("-inf")
    assert sorted(matches(state["points"][:, filled], expected)) == list(range(expected.shape[1]))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_global", [0, 2])
def test_the_sample_holds_the_means_of_real_tokens(is_causal: bool, num_global: int) -> None:
    calibration = new_calibration(3, is_causal, num_global_tokens=num_global)
    mask = torch.tensor([[0] * 4 + [1] * 9, [1, 0, 1] * 4 + [1], [0] * 13]).bool()
    given = call(1, mask, is_causal, batch=3)
    given.query[:, :, 0][~mask[:, 0]] = float("nan")  # padding is not read
    calibration.update(given)
    real = [row.nonzero().flatten().tolist()[num_global:] for row in mask]
    expected = torch.cat([means(given, row, places) for row, places in enumerate(real[:2])], 1)
    state = calibration.state()
    filled = state["priorities"] > float("-inf")
    assert int(state["tokens"]) == int(filled.sum()) == len(real[0]) + len(real[1])
    assert_same_points(state, expected)


def test_queries_of_the_last_tokens_only() -> None:
    calibration = new_calibration(3)
    given = call(1)
    short = AttentionInputs(given.query[:, :, -4:], given.key, given.value, None, scaling=SCALE, is_causal=True)
    calibration.update(short)
    every = torch.cat([means(given, row, list(range(TOKENS)))[:, -4:] for row in (0, 1)], 1)
    assert_same_points(calibration.state(), every)


def test_the_sample_is_bounded_uniform_and_mergeable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lara_calibration, "SAMPLE_SIZE", 50)
    monkeypatch.setattr(lara_calibration, "_QUERIES_AT_ONCE", 5)
    ranks = [new_calibration(3, stream=rank, seed=7) for rank in (0, 1)]
    everything, seen, origin = [], [], []
    for step in range(6):
        for rank, calibration in enumerate(ranks):
            given = call(100 * rank + step)
            calibration.update(given)
            seen += [means(given, row, list(range(TOKENS))) for row in (0, 1)]
            origin += [(rank, step)] * (2 * TOKENS)
        everything += [{name: z.clone() for name, z in c.state().items()} for c in ranks]
    states = [c.state() for c in ranks]
    shapes = [{name: (z.shape, z.dtype) for name, z in state.items()} for state in everything]
    assert all(shape == shapes[0] for shape in shapes)
    assert not torch.equal(states[0]["priorities"], states[1]["priorities"])
    merged = [new_calibration(3, stream=rank, seed=7) for rank in (0, 1)]
    for calibration in merged:
        calibration.merge(states)
    assert all(torch.equal(a, b) for a, b in zip(merged[0].state().values(), merged[1].state().values(), strict=True))
    state = merged[0].state()
    assert int(state["tokens"]) == 2 * 6 * 2 * TOKENS
    largest = torch.cat([s["priorities"] for s in states]).sort(descending=True).values[:50]
    assert torch.equal(state["priorities"], largest)
    index = matches(state["points"], torch.cat(seen, 1))  # every point is one of a token that was seen
    assert len(set(index)) == 50
    # 312 tokens, 50 kept: each half of the stream has 25 +- 3.2 of them.
    assert 10 < sum(origin[i][0] for i in index) < 40
    assert 10 < sum(origin[i][1] >= 3 for i in index) < 40
    results = [c.result() for c in merged]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert results[0]["centroids"].shape == (HEADS, 3, DIM)


def test_calibration_is_repeatable_and_depends_on_seed_and_layer() -> None:
    def priorities(**settings: int) -> Tensor:
        calibration = build(True, **settings).new_calibration()
        calibration.update(call())
        return calibration.state()["priorities"]

    assert torch.equal(priorities(), priorities())
    assert not torch.equal(priorities(), priorities(seed=1))
    assert not torch.equal(priorities(), priorities(layer_idx=1))


def test_too_few_or_bad_tokens_are_refused() -> None:
    calibration = new_calibration(30)
    with pytest.raises(InputError, match=r"30 proposals needs.*got 0.*num_landmarks"):
        calibration.result()
    calibration.update(call())
    with pytest.raises(InputError, match=r"got 26\."):
        calibration.result()
    calibration.update(call(1))
    assert calibration.result()["centroids"].isfinite().all()
    given = call()
    given.key[0, 0, 3, 0] = float("inf")
    calibration.update(given)
    with pytest.raises(InputError, match="not all finite"):
        calibration.result()


def test_calibration_in_half_precision_is_that_of_float32() -> None:
    inputs = call()
    points = []
    for dtype in (torch.float32, torch.bfloat16):
        calibration = new_calibration(3)
        tensors = (z.bfloat16().to(dtype) for z in (inputs.query, inputs.key, inputs.value))
        calibration.update(AttentionInputs(*tensors, None, scaling=SCALE, is_causal=True))
        points.append(calibration.state()["points"])
    assert torch.equal(*points)


def test_calibration_brings_the_layer_closer_to_softmax() -> None:
    # Tokens around a few far-apart places: fixed directions around zero miss them.
    places = torch.randn(1, HEADS, 6, DIM, generator=torch.Generator().manual_seed(4)) * 2

    def tokens(seed: int) -> list[Tensor]:
        q, k, v = qkv(60, batch=4, seed=seed)
        group = torch.arange(60) % 6
        return [q * 0.3 + places[:, :, group], k * 0.3 + places[:, :, group.flip(0)], v]

    module = build(True, window_size=0, num_landmarks=16, samples_per_landmark=4)
    calibration = module.new_calibration()
    calibration.update(AttentionInputs(*tokens(1), None, scaling=SCALE, is_causal=True))
    values = calibration.result()
    q, k, v = tokens(2)
    exact = softmax_attention(q, k, v, is_causal=True)
    errors = []
    for centroids in (torch.zeros_like(values["centroids"]), values["centroids"]):
        module.set_tensors({**values, "centroids": centroids})
        errors.append(float((module(q, k, v) - exact).norm() / exact.norm()))
    assert errors[1] < 0.6 * errors[0]
