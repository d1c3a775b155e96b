"""FAVOR# layers: where statistics come from, calibration, and what happens without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_linattn.errors import ConfigError, InputError, UncalibratedError, UnsupportedError
from hf_linattn.functional import FavorStatistics, favor_attention, favor_statistics
from hf_linattn.modules.base import AttentionInputs, LayerShape
from hf_linattn.modules.kinds.favor_sharp import FavorSharpAttention, FavorSharpConfig
from hf_linattn.ops.favor.statistics import FAVOR_VARIANTS

HEADS, DIM = 2, 4
every_variant = pytest.mark.parametrize("variant", FAVOR_VARIANTS)


def build(is_causal: bool = False, **settings: Any) -> FavorSharpAttention:
    fields = {"num_features": 6, "chunk_size": 4, "window_size": 0, "num_global_tokens": 0, **settings}
    return FavorSharpAttention(FavorSharpConfig(**fields), LayerShape(HEADS, DIM, is_causal=is_causal))


def tensors(tokens: int = 13, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(3))
    return [q + 1, k * torch.tensor([0.3, 1.0, 2.0, 1.0]) - 0.5, v]


def as_inputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **changes: Any) -> AttentionInputs:
    return AttentionInputs(q, k, v, mask, **{"scaling": 0.7, "is_causal": False, **changes})


def calibrate(layer: FavorSharpAttention, *batches: AttentionInputs) -> FavorSharpAttention:
    calibration = layer.new_calibration()
    assert calibration is not None
    for batch in batches:
        calibration.update(batch)
    layer.set_tensors(calibration.result())
    return layer


@every_variant
@pytest.mark.parametrize("centring", [False, True])
@pytest.mark.parametrize("window", [0, 4])
def test_statistics_of_the_row(variant: str, centring: bool, window: int) -> None:
    q, k, v = tensors()
    mask = torch.arange(13) < torch.tensor([[9], [13]])
    layer = build(variant=variant, centring=centring, window_size=window)
    assert layer.new_calibration() is None
    assert {name for name, _ in layer.named_buffers()} == {"projection"}
    stats = favor_statistics(q, k, key_mask=mask, scaling=0.7, variant=variant, centring=centring)
    expected = favor_attention(
        q, k, v, layer.projection, key_mask=mask, scaling=0.7, statistics=stats, window_size=window, chunk_size=4
    )
    torch.testing.assert_close(layer(q, k, v, mask, scaling=0.7), expected, rtol=1e-4, atol=1e-5)


@every_variant
@pytest.mark.parametrize("centring", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_calibrated_statistics(variant: str, centring: bool, is_causal: bool) -> None:
    q, k, v = tensors()
    layer = build(is_causal, variant=variant, centring=centring, statistics="calibrated")
    rows = [as_inputs(*(z[b : b + 1] for z in (q, k, v)), is_causal=is_causal) for b in range(2)]
    calibrate(layer, *rows)
    assert float(layer.calibrated_tokens) == 26
    assert all(buffer.dtype == torch.float32 for buffer in layer.buffers())
    # Both rows together are one long row.
    long = [torch.cat(list(z.double()), 1).unsqueeze(0) for z in (q, k)]
    stats = FavorStatistics(*favor_statistics(*long, scaling=0.7, variant=variant, centring=centring))
    other = tensors(seed=1)
    expected = favor_attention(
        *other, layer.projection, scaling=0.7, statistics=stats, is_causal=is_causal, chunk_size=4
    )
    torch.testing.assert_close(layer(*other, scaling=0.7), expected, rtol=1e-4, atol=1e-4)


def test_padding_and_cached_queries_do_not_count() -> None:
    q, k, v = tensors()
    mask = torch.arange(13) < torch.tensor([[9], [0]])
    padded = calibrate(build(True), as_inputs(q, k, v, mask, is_causal=True))
    short = calibrate(build(True), as_inputs(*(z[:1, :, :9] for z in (q, k, v)), is_causal=True))
    assert float(padded.calibrated_tokens) == 9
    for ours, expected in zip(padded.buffers(), short.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)
    # A causal layer's queries may be the last ones only; the mask is that of the keys.
    few = build(True).new_calibration()
    few.update(as_inputs(q[:, :, -5:], k, v, mask, is_causal=True))
    assert (float(few.state()["query_count"]), float(few.state()["key_count"])) == (1, 9)


@every_variant
def test_merging_states_is_seeing_everything(variant: str) -> None:
    layer = build(True, variant=variant)
    batches = [as_inputs(*tensors(5 + 3 * i, seed=i), is_causal=True) for i in range(4)]
    parts = [layer.new_calibration() for _ in range(3)]
    for i, batch in enumerate(batches):
        parts[i % 2].update(batch)  # the third has seen nothing
    states = [part.state() for part in parts]
    assert len({tuple((n, t.shape, t.dtype) for n, t in state.items()) for state in states}) == 1
    whole = layer.new_calibration()
    for batch in batches:
        whole.update(batch)
    for part in parts:
        part.merge(states)
    for name, expected in whole.result().items():
        torch.testing.assert_close(parts[0].result()[name], expected, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(part.result()[name], parts[0].result()[name]) for part in parts)


def test_an_uncalibrated_layer_raises() -> None:
    for layer in (build(True), build(statistics="calibrated")):
        with pytest.raises(UncalibratedError, match="hf_linattn.calibrate"):
            layer(*tensors())
        calibrate(layer, as_inputs(*tensors()))
        assert layer(*tensors()).isfinite().all()


def test_too_little_or_broken_data() -> None:
    layer = build(True)
    with pytest.raises(InputError, match="got 0 queries and 0 keys"):
        layer.new_calibration().result()
    q, k, v = tensors()
    calibration = layer.new_calibration()
    calibration.update(as_inputs(q, k, v, torch.zeros(2, 13, dtype=torch.bool)))
    with pytest.raises(InputError, match="not all padding"):
        calibration.result()
    k[0, 0, 0, 0] = float("inf")
    calibration.update(as_inputs(q, k, v))
    with pytest.raises(InputError, match="finite"):
        calibration.result()


def test_settings_that_cannot_work() -> None:
    with pytest.raises(UnsupportedError, match="statistics='row'"):
        build(True, statistics="row")
    with pytest.raises(UnsupportedError, match="num_heavy_keys"):
        build(True, num_heavy_keys=2)
    with pytest.raises(ConfigError, match="Did you mean 'calibrated'"):
        FavorSharpConfig(statistics="calibrate")
    assert FavorSharpConfig().variant == "saderf"


def test_heavy_keys_reach_the_function() -> None:
    q, k, v = tensors()
    layer = build(num_heavy_keys=3)
    expected = favor_attention(
        q, k, v, layer.projection, statistics=favor_statistics(q, k), num_heavy_keys=3, chunk_size=4
    )
    torch.testing.assert_close(layer(q, k, v), expected)
    assert not torch.allclose(build()(q, k, v), expected, atol=1e-3)


def test_native_causal_favor_sharp_is_favor_plus_and_says_so() -> None:
    """Native mode: `compute` with the first state, which nothing calibrates."""
    layer = build(True)
    state = layer.initial_state()
    q, k, v = tensors()
    inputs = as_inputs(q, k, v, is_causal=True)
    with pytest.warns(UserWarning, match="no calibrated statistics.*FAVOR\\+"):
        assert layer.native_refusal(layer.config, layer.shape, training=False) is None
    out = layer.compute(layer.config, state, inputs)
    expected = favor_attention(q, k, v, layer.projection, scaling=0.7, is_causal=True, chunk_size=4)
    torch.testing.assert_close(out, expected)


def test_calibrated_layers_know_no_later_token() -> None:
    layer = calibrate(build(True, variant="dense"), as_inputs(*tensors(seed=3), is_causal=True))
    q, k, v = tensors()
    first = layer(q, k, v)
    later = [torch.cat([z[:, :, :7], z[:, :, 7:] * 5 + 1], 2) for z in (q, k, v)]
    torch.testing.assert_close(layer(*later)[:, :, :7], first[:, :, :7], rtol=0, atol=1e-6)


def test_calibrated_layers_compile_into_one_graph() -> None:
    layer = calibrate(build(True, variant="dense"), as_inputs(*tensors(seed=3), is_causal=True))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors()), layer(*tensors()))
