"""EVA layers with learned biases of relative positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import inputs

from hf_linattn.errors import ConfigError, InputError
from hf_linattn.functional import eva_attention, softmax_attention
from hf_linattn.modules.base import AttentionInputs, LayerShape
from hf_linattn.modules.defaults import resolve
from hf_linattn.modules.kinds.eva import EvaAttention, EvaConfig
from hf_linattn.ops.eva.relative_position import t5_index, t5_sizes, table_index
from hf_linattn.ops.noise import RowNoise


def build(is_causal: bool = False, **fields: Any) -> EvaAttention:
    fields = {"window_size": 4, "num_chunks": 5, "chunk_size": 2, "proposal_map": "none", **fields}
    return EvaAttention(EvaConfig(**fields), LayerShape(2, 4, is_causal=is_causal)).double().eval()


def scramble(layer: EvaAttention) -> EvaAttention:
    with torch.no_grad():
        layer.relative_table.copy_(torch.sin(torch.arange(layer.relative_table.numel())).view_as(layer.relative_table))
    return layer


@pytest.mark.parametrize("position", ["table", "t5"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("convention", ["corrected", "published"])
def test_a_layer_is_its_function(position: str, is_causal: bool, overlap: bool, convention: str) -> None:
    fields = {"relative_position": position, "overlap_window": overlap, "relative_index": convention}
    layer = build(is_causal, **fields)
    q, k, v = inputs(21)
    plain = build(is_causal, overlap_window=overlap)(q, k, v)
    torch.testing.assert_close(layer(q, k, v), plain, rtol=0, atol=1e-14)  # zero at first
    table = scramble(layer).relative_table
    left, right = (4 if overlap else 0), (4 if overlap and not is_causal else 0)
    if position == "table":
        bias = table[:, table_index(4, left, right, convention=convention)]
    else:
        buckets, furthest = t5_sizes(4, left)
        index = t5_index(
            4, left, right, num_buckets=buckets, max_distance=furthest, is_causal=is_causal, convention=convention
        )
        bias = table[:, index] * (0.5 if convention == "published" else 1.0)  # 0.5: the scale of the dot product
    layout: dict[str, Any] = {"chunk_size": 2, "proposals": "key"} if is_causal else {"num_chunks": 5}
    expected = eva_attention(
        q, k, v, window_size=4, window_bias=bias, overlap_window=overlap, is_causal=is_causal, **layout
    )
    torch.testing.assert_close(layer(q, k, v), expected, rtol=0, atol=1e-12)
    assert (layer(q, k, v) - plain).abs().max() > 1e-3


def test_table_and_distances_are_those_between_tokens() -> None:
    # In one window, a bias per offset is attention with a bias per pair of tokens.
    layer = scramble(build(window_size=21, relative_position="table", overlap_window=True))
    q, k, v = inputs(13)
    offset = torch.arange(13)[:, None] - torch.arange(13)
    bias = layer.relative_table[:, offset + 41]  # offsets from -41 to 41
    expected = ((q @ k.transpose(-1, -2)) / 2 + bias).softmax(-1) @ v
    torch.testing.assert_close(layer(q, k, v), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", ["table", "t5"])
def test_relative_positions_on_images(position: str) -> None:
    layer = scramble(build(window_size=2, relative_position=position, relative_dims=2, overlap_window=True))
    q, k, v = inputs(20)
    grid = (4, 5)
    out = layer(q, k, v, grid=grid)
    assert out.isfinite().all()
    with pytest.raises(InputError, match="relative_dims=1"):
        layer(q, k, v)
    with pytest.raises(InputError, match="relative_dims=2"):
        build(relative_position=position)(q, k, v, grid=grid)


def test_the_table_learns() -> None:
    layer = build(relative_position="table", overlap_window=True, num_chunks=21).train()
    layer(*inputs(21)).square().sum().backward()
    grad = layer.relative_table.grad
    assert (grad[:, 2:-2] != 0).all()
    assert (grad[:, [0, 1, -2, -1]] == 0).all()  # farther than the window reaches


def test_without_parameters_there_is_no_bias() -> None:
    q, k, v = inputs(21)
    config = resolve(EvaConfig(window_size=4, relative_position="table", proposals="sum", weighting="size"), "encoder")
    given = AttentionInputs(q, k, v, None, scaling=0.5, is_causal=False)
    assert torch.equal(EvaAttention.compute(config, {}, given), eva_attention(q, k, v, window_size=4))


@pytest.mark.parametrize("fields", [{}, {"overlap_window": True}, {"conventions": "published", "num_chunks": 2}])
def test_one_window_is_softmax(fields: dict[str, Any]) -> None:
    q, k, v = inputs(4)
    layer = build(relative_position="t5", **fields)
    if "conventions" not in fields:  # the published layout reads chunks beside the window that covers them
        torch.testing.assert_close(layer(q, k, v), softmax_attention(q, k, v), rtol=0, atol=1e-12)
    else:
        assert (layer(q, k, v) - softmax_attention(q, k, v)).abs().max() > 1e-3


@pytest.mark.parametrize("scale", ["corrected", "published"])
def test_noise_in_training(scale: str) -> None:
    q, k, v = inputs(21)
    layer = build(sample_noise=True, noise_scale=scale).train()
    torch.manual_seed(0)
    ours = layer(q, k, v)
    torch.manual_seed(0)
    noise = RowNoise.drawn(q)
    expected = eva_attention(q, k, v, window_size=4, num_chunks=5, noise=noise, noise_scale=scale)
    assert torch.equal(ours, expected)
    assert torch.equal(layer.eval()(q, k, v), eva_attention(q, k, v, window_size=4, num_chunks=5))


def test_published_conventions() -> None:
    layer = build(conventions="published", proposal_map=None)
    assert layer.config.chunking == "published"
    assert layer.config.weighting == "none"
    assert layer.config.proposals == "mean"
    assert "query_norm_weight" in layer.state_dict()
    causal = build(True, conventions="published", proposal_map=None, chunk_size=None)
    assert causal.config.proposals == "sum"
    assert causal(*inputs(21)).isfinite().all()
    alone = build(conventions="published", proposals="none", proposal_map=None)
    assert "query_norm_weight" not in alone.state_dict()


def test_settings_that_cannot_work() -> None:
    for field, value in (("relative_position", "rotary"), ("relative_index", "official"), ("relative_dims", 3)):
        with pytest.raises(ConfigError, match=field):
            EvaConfig(**{field: value})
    with pytest.raises(ConfigError, match="chunk_size must be an integer"):
        build(True, chunk_size=None)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("chunking", ["exclusive", "published"])
def test_compiled_relative_positions(is_causal: bool, chunking: str) -> None:
    torch._dynamo.reset()
    q, k, v = (z.float() for z in inputs(21))
    mask = torch.arange(21) < torch.tensor([[21], [13]])
    layer = build(is_causal, relative_position="t5", overlap_window=True, chunking=chunking).float()
    scramble(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, mask), layer(q, k, v, mask))
    if not is_causal:
        image = build(window_size=2, relative_position="table", relative_dims=2, chunking=chunking).float()
        q, k, v = (z.float() for z in inputs(20))
        scramble(image)
        compiled = torch.compile(image, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(q, k, v, grid=(4, 5)), image(q, k, v, grid=(4, 5)))
