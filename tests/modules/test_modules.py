"""`LinearAttention`: state, dtypes, devices, determinism, and that a module is its function with its settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_linattn.errors import ConfigError, LinAttnError, UnsupportedError
from hf_linattn.functional import (
    FavorStatistics,
    draw_projection,
    eva_attention,
    favor_attention,
    favor_statistics,
    lara_attention,
)
from hf_linattn.modules.base import LayerShape, LinearAttention
from hf_linattn.modules.registry import get_kind, list_kinds

HEADS, DIM, TOKENS = 2, 4, 13
SMALL: dict[str, dict[str, Any]] = {
    "favor_plus": {"num_features": 6, "chunk_size": 4},
    "favor_sharp": {"num_features": 6, "chunk_size": 4},
    "lara": {"num_landmarks": 3},
    "eva": {"num_chunks": 3, "chunk_size": 2},
}
LAYERS = [(kind, causal) for kind in list_kinds() for causal in (False, True) if kind != "lara" or not causal]
every = pytest.mark.parametrize(("kind", "is_causal"), LAYERS)


def build(kind: str, is_causal: bool = False, layer_idx: int = 0, **settings: Any) -> LinearAttention:
    declared = get_kind(kind)
    count = 0 if is_causal else 1
    small = SMALL.get(kind, {declared.size_field: 6})
    config = declared.config_cls(**{"window_size": 4, "num_global_tokens": count, **small, **settings})
    module = declared.module_cls(config, LayerShape(HEADS, DIM, layer_idx, is_causal))
    if "calibrated_tokens" in module._buffers:
        module.calibrated_tokens.fill_(1)  # neutral statistics will do here
    return module


def inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, tokens, DIM, generator=generator).to(dtype) for _ in range(3)]


def scramble(module: LinearAttention) -> LinearAttention:
    """Learned tensors away from their first values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


def state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# -- what the modules compute ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_a_module_is_its_function(window: int, scaling: float | None) -> None:
    q, k, v = inputs()
    mask = torch.arange(TOKENS) < torch.tensor([[9], [TOKENS]])
    shared: dict[str, Any] = {"key_mask": mask, "scaling": scaling, "window_size": window, "num_global_tokens": 1}

    def run(module: LinearAttention) -> Tensor:
        return module(q, k, v, mask, scaling=scaling)

    plus = build("favor_plus", window_size=window)
    assert torch.equal(run(plus), favor_attention(q, k, v, plus.projection, chunk_size=4, **shared))
    for variant in ("saderf", "gerf"):
        for centring in (True, False):
            sharp = build("favor_sharp", window_size=window, variant=variant, centring=centring)
            stats = favor_statistics(q, k, key_mask=mask, scaling=scaling, variant=variant, centring=centring)
            expected = favor_attention(q, k, v, sharp.projection, statistics=stats, chunk_size=4, **shared)
            torch.testing.assert_close(run(sharp), expected)

    def maps(module: LinearAttention) -> dict[str, Any]:
        return {
            "query_map": lambda z: z + z @ module.query_adapter,
            "key_map": lambda z: z + z @ module.key_adapter,
        }

    for weighting in ("balance", "optimal"):
        lara = scramble(build("lara", window_size=window, weighting=weighting))
        expected = lara_attention(
            q, k, v, num_landmarks=3, weighting=weighting, offset=lara.mass_offset, **maps(lara), **shared
        )
        torch.testing.assert_close(run(lara), expected)
    if window:
        for weighting in ("size", "spread"):
            eva = scramble(build("eva", window_size=window, weighting=weighting))
            assert torch.equal(
                run(eva), eva_attention(q, k, v, num_chunks=3, weighting=weighting, **maps(eva), **shared)
            )


def test_causal_modules_are_their_functions() -> None:
    q, k, v = inputs()
    plus, eva = build("favor_plus", True), scramble(build("eva", True, proposals="sum"))
    assert torch.equal(
        plus(q, k, v), favor_attention(q, k, v, plus.projection, is_causal=True, window_size=4, chunk_size=4)
    )
    expected = eva_attention(
        q,
        k,
        v,
        is_causal=True,
        window_size=4,
        chunk_size=2,
        query_map=lambda z: z + z @ eva.query_adapter,
        key_map=lambda z: z + z @ eva.key_adapter,
    )
    assert torch.equal(eva(q, k, v), expected)
    sharp = build("favor_sharp", True)
    torch.testing.assert_close(
        sharp(q, k, v), favor_attention(q, k, v, sharp.projection, is_causal=True, window_size=4, chunk_size=4)
    )
    stats = FavorStatistics(*favor_statistics(q[:1], k[:1]))
    for name, value in stats._asdict().items():
        value = torch.diag_embed(value.squeeze(-2)) if name.endswith("transform") else value
        getattr(sharp, f"statistics_{name}").copy_(value)
    expected = favor_attention(
        q, k, v, sharp.projection, statistics=stats, is_causal=True, window_size=4, chunk_size=4
    )
    torch.testing.assert_close(sharp(q, k, v), expected)


def test_images_reach_the_function() -> None:
    q, k, v = inputs()
    for kind in list_kinds():
        module = build(kind, window_size=2)
        assert not torch.allclose(module(q, k, v, grid=(3, 4)), module(q, k, v))


@every
def test_fresh_modules_equal_the_method_without_parameters(kind: str, is_causal: bool) -> None:
    q, k, v = inputs()
    converted = build(kind, is_causal)
    if kind in ("lara", "eva"):
        native = build(kind, is_causal, proposal_map="none")
        assert not state(native)
        torch.testing.assert_close(converted(q, k, v), native(q, k, v), rtol=0, atol=1e-6)
        changed = scramble(copy.deepcopy(converted))
        assert not torch.allclose(changed(q, k, v), converted(q, k, v), atol=1e-3)
    else:
        assert not list(converted.parameters())


@pytest.mark.parametrize(("kind", "is_causal"), [("lara", False), ("eva", False), ("eva", True)])
def test_every_parameter_learns(kind: str, is_causal: bool) -> None:
    module = build(kind, is_causal, **({"proposals": "sum"} if kind == "eva" else {}))
    module(*inputs()).square().sum().backward()
    names = {"query_adapter", "key_adapter"} | ({"mass_offset"} if kind == "lara" else set())
    assert {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == names


def test_which_state_a_layer_has() -> None:
    assert set(state(build("lara", window_size=0, num_global_tokens=0))) == {"query_adapter", "key_adapter"}
    assert "mass_offset" in state(build("lara", window_size=0, num_global_tokens=1))
    assert set(state(build("eva", True))) == {"key_adapter"}  # a cache keeps no queries
    assert set(state(build("eva", True, proposals="sum"))) == {"key_adapter", "query_adapter"}
    assert set(state(build("eva"))) == {"key_adapter", "query_adapter"}
    assert set(state(build("favor_sharp"))) == {"projection"}
    assert set(state(build("favor_sharp", True))) == {
        "projection",
        *(f"statistics_{n}" for n in FavorStatistics._fields),
        "calibrated_tokens",
    }


# -- randomness and training ----------------------------------------------------------------------------------------


@every
def test_first_state_depends_on_seed_and_layer_alone(kind: str, is_causal: bool) -> None:
    torch.manual_seed(1)
    first = build(kind, is_causal)
    torch.manual_seed(2)
    again = build(kind, is_causal)
    first.reset_parameters()
    again.reset_parameters()
    for name, tensor in state(first).items():
        assert torch.equal(tensor, state(again)[name])
        assert torch.equal(tensor, first.initial_state()[name])
        assert first.initial_state()[name].dtype == torch.float32
    if "projection" in state(first):
        other_seed, other_layer = build(kind, is_causal, seed=1), build(kind, is_causal, layer_idx=1)
        draws = [m.projection for m in (first, other_seed, other_layer)]
        assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_settings_of_the_directions() -> None:
    torch.testing.assert_close(build("favor_plus", regularized=True).projection.norm(dim=-1), torch.full((2, 6), 2.0))
    free, tied = build("favor_plus", orthogonal=False).projection, build("favor_plus").projection
    assert (tied[:, 0] * tied[:, 1]).sum(-1).abs().max() < 1e-5
    assert (free[:, 0] * free[:, 1]).sum(-1).abs().min() > 1e-3
    assert free.shape == tied.shape == (HEADS, 6, DIM)
    assert not torch.equal(tied, draw_projection(HEADS, 6, DIM, seed=0))  # the layer is mixed into the seed


@every
def test_dropout_and_noise_act_in_training_only(kind: str, is_causal: bool) -> None:
    tensors = inputs()
    for settings in [{"slot_dropout": 0.5}, *([{"sample_noise": True}] if kind in ("lara", "eva") else [])]:
        module, plain = build(kind, is_causal, **settings), build(kind, is_causal)
        assert module.training
        assert not torch.equal(module(*tensors), module(*tensors))
        module.eval()
        assert torch.equal(module(*tensors), plain(*tensors))
        assert torch.equal(module(*tensors), module(*tensors))


# -- dtypes and devices ---------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["to", "method", "parent", "dtype and device"])
def test_buffers_keep_their_float32_values(kind: str, is_causal: bool, dtype: torch.dtype, how: str) -> None:
    module = build(kind, is_causal)
    before = {name: b.clone() for name, b in module.named_buffers()}
    parent = nn.Sequential(module)
    if how == "parent":
        parent.to(dtype)
    elif how == "method":
        {torch.bfloat16: module.bfloat16, torch.float16: module.half, torch.float64: module.double}[dtype]()
    else:
        module.to(**({"dtype": dtype} if how == "to" else {"dtype": dtype, "device": "cpu"}))
    assert all(p.dtype == dtype for p in module.parameters())
    assert dict(module.named_buffers()).keys() == before.keys()
    for name, buffer in module.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])
    q, k, v = inputs(dtype=dtype)
    out = module(q, k, v)
    assert out.dtype == dtype
    assert out.isfinite().all()


@every
def test_the_meta_device(kind: str, is_causal: bool) -> None:
    real = build(kind, is_causal)
    real.reset_parameters()
    moved = copy.deepcopy(real).to("meta")
    with torch.device("meta"):
        born = build(kind, is_causal)
    for module in (moved, born, copy.deepcopy(real).to("meta", torch.bfloat16)):
        assert all(tensor.is_meta for tensor in state(module).values())
        assert all(buffer.dtype == torch.float32 for buffer in module.buffers())
        module.to_empty(device="cpu").reset_parameters()
        for name, tensor in state(module).items():
            assert torch.equal(tensor.float(), state(real)[name])


@every
def test_copies_and_state_dicts(kind: str, is_causal: bool) -> None:
    tensors = inputs()
    module = scramble(build(kind, is_causal, seed=4))
    twin = copy.deepcopy(module)
    assert torch.equal(twin(*tensors), module(*tensors))
    other = build(kind, is_causal, seed=5)
    if state(module):
        assert not torch.equal(other(*tensors), module(*tensors))
    assert set(module.state_dict()) == set(state(module))  # nothing is left out of a checkpoint
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*tensors), module(*tensors))
    for ours, theirs in zip(state(module).values(), state(twin).values(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr()


@every
def test_state_is_not_created_in_forward(kind: str, is_causal: bool) -> None:
    module = build(kind, is_causal)
    before = {name: tensor.clone() for name, tensor in state(module).items()}
    module(*inputs())
    assert state(module).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(module).items())


# -- what cannot work -----------------------------------------------------------------------------------------------


def test_layers_that_cannot_work_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="LARA has no causal form.*favor_plus"):
        build("lara", True, proposal_source="landmarks")
    with pytest.raises(ConfigError, match="window_size must be an integer >= 1.*got 0"):
        build("eva", window_size=0)
    with pytest.raises(ConfigError, match="chunk_size must divide window_size.*chunk_size=3"):
        build("eva", True, chunk_size=3)
    build("eva", False, chunk_size=3)  # not used there
    assert build("eva", window_size=None).config.window_size == 32  # the default of the family
    for kind in ("favor_plus", "favor_sharp", "eva"):
        with pytest.raises(LinAttnError, match="causal"):
            build(kind, True, num_global_tokens=1)(*inputs())


def test_layers_made_or_moved_under_inference_mode_work() -> None:
    for kind, is_causal in LAYERS:
        with torch.inference_mode():
            module = build(kind, is_causal)
            assert module(*inputs()).isfinite().all()
        assert module(*inputs()).isfinite().all()
