"""FAVOR's settings: shared directions, redraws, generalised kernels, heavy keys."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_linattn.modules.kinds.favor_plus as favor_plus_module
from hf_linattn.errors import ConfigError, InputError, UnsupportedError
from hf_linattn.functional import derive_seed, draw_projection, favor_attention
from hf_linattn.modules.base import LayerShape
from hf_linattn.modules.defaults import resolve
from hf_linattn.modules.kinds.favor_plus import FavorPlusConfig
from hf_linattn.modules.registry import config_from_dict, get_kind
from hf_linattn.ops.favor.generalized import KERNELS, generalized_attention

HEADS, DIM, TOKENS, FEATURES = 2, 4, 13, 6  # FEATURES is no multiple of DIM
KINDS = ["favor_plus", "favor_sharp"]
every = pytest.mark.parametrize("kind", KINDS)


def build(kind: str = "favor_plus", is_causal: bool = False, layer_idx: int = 0, **settings: Any) -> Any:
    declared = get_kind(kind)
    config = declared.config_cls(**{"num_features": FEATURES, **settings})
    return declared.module_cls(config, LayerShape(HEADS, DIM, layer_idx, is_causal))


def inputs(tokens: int = TOKENS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, tokens, DIM, generator=generator) for _ in range(3)]


# -- shared directions ----------------------------------------------------------------------------------------------


@every
def test_shared_directions_are_those_of_one_head_given_to_all(kind: str) -> None:
    module = build(kind, shared_projection=True, window_size=4)
    assert module.projection.shape == (FEATURES, DIM)
    one = draw_projection(1, FEATURES, DIM, seed=derive_seed(0, 0, "projection"))
    assert torch.equal(module.projection, one[0])
    apart = build(kind, window_size=4)
    apart.projection.copy_(one.expand(HEADS, -1, -1))
    torch.testing.assert_close(module(*inputs()), apart(*inputs()))
    assert not torch.equal(apart.projection, build(kind).projection)


@pytest.mark.parametrize(("window", "is_causal"), list(itertools.product([0, 4], [False, True])))
def test_shared_directions_in_every_form(window: int, is_causal: bool) -> None:
    module = build(shared_projection=True, window_size=window, num_global_tokens=0, is_causal=is_causal)
    expanded = module.projection.expand(HEADS, -1, -1)
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [7]])
    expected = favor_attention(*inputs(), expanded, key_mask=mask, window_size=window, is_causal=is_causal)
    torch.testing.assert_close(module(*inputs(), mask), expected)


# -- redraws --------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shared", [False, True])
def test_directions_follow_from_seed_layer_and_redraw(kind: str, shared: bool) -> None:
    fields: dict[str, Any] = {"redraw_interval": 10, "seed": 5, "shared_projection": shared}
    module, again = (build(kind, layer_idx=3, **fields) for _ in range(2))
    plain = build(kind, layer_idx=3, seed=5, shared_projection=shared)
    heads = None if shared else HEADS
    for count, step in ((0, 0), (0, 9), (1, 10), (1, 19), (2, 20), (7, 79)):
        module.set_training_step(step)
        number = () if count == 0 else (count,)
        expected = draw_projection(heads, FEATURES, DIM, seed=derive_seed(5, 3, "projection", *number))
        assert torch.equal(module.projection, expected)
        if count == 0:  # checkpoints of layers without redraws keep their meaning
            assert torch.equal(module.projection, plain.projection)
    again.set_training_step(79)
    assert torch.equal(module.projection, again.projection)
    other = build(kind, layer_idx=2, **fields)
    other.set_training_step(79)
    assert not torch.equal(other.projection, module.projection)


def test_regularised_and_independent_directions_stay_so() -> None:
    module = build(redraw_interval=1, regularized=True)
    module.set_training_step(3)
    torch.testing.assert_close(module.projection.norm(dim=-1), torch.full((HEADS, FEATURES), DIM**0.5))
    module = build(redraw_interval=1, orthogonal=False)
    module.set_training_step(3)
    assert (module.projection[:, 0] * module.projection[:, 1]).sum(-1).abs().min() > 1e-3


def test_redraws_of_one_layer_are_unbiased_and_independent() -> None:
    """Statements about means at five standard errors: a false alarm in one of a million draws, with a fixed seed."""
    module = build(redraw_interval=1)
    draws = []
    for step in range(4000):
        module.set_training_step(step)
        draws.append(module.projection.double().clone())
    w = torch.stack(draws)  # [draws, heads, features, dim]
    x, y = torch.eye(DIM).double()[:2]

    def z_score(samples: Tensor, expected: float) -> float:
        return float(((samples.mean(0) - expected) / (samples.std(0) / math.sqrt(len(samples)))).abs().max())

    assert z_score(w, 0.0) < 5  # signs of every component of every row, the first ones included
    assert z_score(w.square(), 1.0) < 5
    for a, b in ((x, x), (-x, -x), (x, y), (x, -y / 2)):
        feature = (w @ (a + b) - (a @ a + b @ b) / 2).exp().mean(-1)
        assert z_score(feature, math.exp(a @ b)) < 5
    assert z_score(w[1:] * w[:-1], 0.0) < 5  # one redraw says nothing about the next


def test_redraws_keep_place_dtype_and_random_state() -> None:
    module = build(redraw_interval=2).to(torch.bfloat16)
    before, state = module.projection, torch.get_rng_state()
    address = before.data_ptr()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert module.set_training_step(2)
    assert module.projection is before
    assert before.data_ptr() == address
    assert before.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    q, k, v = (z.requires_grad_() for z in inputs())
    module(q, k, v).sum().backward()  # what was drawn under inference_mode can be trained with


def test_only_changes_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = build(redraw_interval=5), []

    def draw(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["seed"])
        return draw_projection(*args, **kwargs)

    monkeypatch.setattr(favor_plus_module, "draw_projection", draw)
    assert [module.set_training_step(step) for step in range(12)] == [s in (0, 5, 10) for s in range(12)]
    assert len(calls) == len(set(calls)) == 3
    assert not build().set_training_step(3)  # without an interval
    with torch.device("meta"):
        assert not build(redraw_interval=1).set_training_step(3)


def test_fresh_values_and_loaded_ones_are_known_to_be_others() -> None:
    module = build(redraw_interval=5)
    module.set_training_step(5)
    saved, drawn = copy.deepcopy(module.state_dict()), module.projection.clone()
    module.reset_parameters()
    assert module.set_training_step(5)
    assert torch.equal(module.projection, drawn)
    module.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in saved.items()})
    assert module.set_training_step(9)
    assert torch.equal(module.projection, drawn)


@pytest.mark.parametrize("step", [-1, 1.5, "1", None, True])
def test_a_step_is_a_number_of_steps(step: Any) -> None:
    with pytest.raises(InputError, match="step must be the number of optimizer steps taken so far"):
        build(redraw_interval=1).set_training_step(step)


@every
def test_training_without_being_told_a_step_warns_once(kind: str) -> None:
    module = build(kind, redraw_interval=3, window_size=4).train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            module(*inputs())
        with torch.no_grad():
            module(*inputs())
        module.eval()(*inputs())
        assert not caught
        module.train()
        for _ in range(4):
            module(*inputs())
    (only,) = caught
    assert "redraw_interval=3" in str(only.message)
    assert "LinAttnCallback()" in str(only.message)
    assert "redraw_projections(model, step)" in str(only.message)


@every
def test_no_warning_where_no_redraw_is_missing(kind: str) -> None:
    torch._dynamo.reset()
    told, none, compiled = (build(kind, redraw_interval=i, window_size=4).train() for i in (1, None, 1))
    told.set_training_step(0)
    told.load_state_dict(told.state_dict())
    run = torch.compile(compiled, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            told(*inputs())
            none(*inputs())
            run(*inputs())


# -- generalised kernels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_module_with_a_kernel_is_its_function(kernel: str, is_causal: bool) -> None:
    module = build(kernel=kernel, kernel_epsilon=0.01, is_causal=is_causal, chunk_size=4).eval()
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [7]])
    expected = generalized_attention(
        *inputs(),
        module.projection,
        kernel=kernel,
        kernel_epsilon=0.01,
        key_mask=mask,
        scaling=0.3,
        is_causal=is_causal,
        chunk_size=4,
    )
    assert torch.equal(module(*inputs(), mask, scaling=0.3), expected)
    softmax = build(window_size=0, is_causal=is_causal, chunk_size=4)
    assert not torch.allclose(module(*inputs(), mask, scaling=0.3), softmax(*inputs(), mask, scaling=0.3), atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_kernels_have_no_window_and_no_global_tokens_by_default(family: str) -> None:
    config = resolve(FavorPlusConfig(kernel="relu"), family)
    assert (config.window_size, config.num_global_tokens) == (0, 0)
    assert config_from_dict(config.to_dict()) == config
    assert resolve(config, family) == config
    assert resolve(FavorPlusConfig(), family).kernel == "softmax"
    assert resolve(FavorPlusConfig(), family).window_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_size": 4}, r"window_size must be 0 with kernel='relu'; got 4\. .*not on the scale of the softmax"),
        ({"num_global_tokens": 1}, "num_global_tokens must be 0 with kernel='relu'; got 1"),
        ({"num_heavy_keys": 2}, "num_heavy_keys must be 0 with kernel='relu'; got 2"),
        ({"overlap_window": True}, "overlap_window must be False with kernel='relu'; got True"),
    ],
)
def test_nothing_exact_beside_a_kernel(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FavorPlusConfig(kernel="relu", **fields)
    FavorPlusConfig(kernel="relu", window_size=0, num_global_tokens=0)
    with pytest.raises(ConfigError):
        resolve(FavorPlusConfig(), "bert").replace(kernel="relu")


def test_kernels_redraw_share_and_regularise_too() -> None:
    module = build(kernel="relu", shared_projection=True, regularized=True, redraw_interval=1)
    before = module(*inputs())
    module.set_training_step(1)
    assert not torch.allclose(before, module(*inputs()))


# -- heavy keys -----------------------------------------------------------------------------------------------------


@every
def test_heavy_keys_are_not_for_causal_layers(kind: str) -> None:
    with pytest.raises(UnsupportedError, match="Heavy keys are chosen by all queries.*num_heavy_keys=3"):
        build(kind, is_causal=True, num_heavy_keys=3)


def test_heavy_keys_reach_the_function() -> None:
    module = build(num_heavy_keys=3, window_size=4, num_global_tokens=1)
    options: dict[str, Any] = {"window_size": 4, "num_global_tokens": 1}
    expected = favor_attention(*inputs(), module.projection, num_heavy_keys=3, **options)
    assert torch.equal(module(*inputs()), expected)
    assert not torch.allclose(expected, favor_attention(*inputs(), module.projection, **options))
