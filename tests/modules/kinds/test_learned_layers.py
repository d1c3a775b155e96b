"""Layers of every kind with learned maps: gradients of each parameter in every layout, and very large inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import inputs, random
from torch import Tensor

from hf_linattn.errors import ConfigError
from hf_linattn.modules.base import AttentionInputs, LayerShape, LinearAttention
from hf_linattn.modules.config import LearnedConfig
from hf_linattn.modules.learned_maps import parameter_groups
from hf_linattn.modules.registry import get_kind, list_kinds

HEADS, DIM = 2, 4
MASK = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1]]).bool()
KINDS = [name for name in list_kinds() if issubclass(get_kind(name).config_cls, LearnedConfig)]
VARIANTS = [(kind, {}) for kind in KINDS] + [
    (kind, {"normalizer": "kernel"})
    for kind in KINDS
    if "normalizer" in get_kind(kind).config_cls.__dataclass_fields__
]
IMAGE = {"window_size": 2, "num_global_tokens": 1}
# Settings, and how the layer is called.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no window": ({"window_size": 0}, {}),
    "window": ({"window_size": 2}, {}),
    "padding": ({"window_size": 2}, {"key_mask": MASK}),
    "overlap": ({"window_size": 2, "overlap_window": True}, {"key_mask": MASK}),
    "global tokens": (IMAGE, {"key_mask": MASK}),
    "heavy keys": ({"window_size": 2, "num_heavy_keys": 2}, {"key_mask": MASK}),
    "image": (IMAGE, {"grid": (2, 4)}),
    "image, convolution": ({**IMAGE, "value_convolution": True}, {"grid": (2, 4)}),
    "causal, no window": ({"window_size": 0}, {"is_causal": True}),
    "causal": ({"window_size": 2}, {"is_causal": True}),
    "causal, padding": ({"window_size": 2}, {"is_causal": True, "key_mask": MASK}),
    "causal, overlap": ({"window_size": 2, "overlap_window": True}, {"is_causal": True}),
    "causal, bounded": ({"window_size": 2, "max_chunks": 2}, {"is_causal": True}),
}


def settings_of(kind: str, layout: str, **more: Any) -> dict[str, Any] | None:
    """Settings of a layer; `None` if the kind has no such layout."""
    record, fields = get_kind(kind), {"num_global_tokens": 0, **LAYOUTS[layout][0], **more}
    if (record.needs_window and not fields["window_size"]) or set(fields) - set(
        record.config_cls.__dataclass_fields__
    ):
        return None
    return {**fields, "learned": True, record.size_field: 3}


CASES = {
    "-".join([kind, *more.values(), layout]): (kind, settings, layout)
    for kind, more in VARIANTS
    for layout in LAYOUTS
    if (settings := settings_of(kind, layout, **more)) is not None
}


def build(case: str) -> LinearAttention[Any]:
    kind, settings, layout = CASES[case]
    is_causal, record = LAYOUTS[layout][1].get("is_causal", False), get_kind(kind)
    return record.module_cls(record.config_cls(**settings), LayerShape(HEADS, DIM, 0, is_causal))


def trained(layer: LinearAttention[Any]) -> dict[str, Tensor]:
    """The layer's tensors in float64, none of what it learns at its start; statistics are those of some tokens."""
    if (calibration := layer.new_calibration()) is not None:
        calibration.update(AttentionInputs(*inputs(40), None, scaling=DIM**-0.5, is_causal=layer.shape.is_causal))
        layer.set_tensors(calibration.result())
    state = {name: tensor.detach().double() for name, tensor in layer.tensors().items()}
    for number, (name, parameter) in enumerate(sorted(layer.named_parameters())):
        state[name] = random(*parameter.shape, seed=number, scale=0.5)
    return state


def called(case: str, tokens: list[Tensor]) -> AttentionInputs:
    where = LAYOUTS[CASES[case][2]][1]
    return AttentionInputs(*tokens, **{"key_mask": None, "scaling": DIM**-0.5, "is_causal": False, **where})


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_every_parameter(case: str) -> None:
    layer = build(case)
    state, names = trained(layer), [name for name, _ in layer.named_parameters()]
    tokens = [z.requires_grad_() for z in inputs(9, batch=1)]
    learned = [state[name].requires_grad_() for name in names]

    def attention(query: Tensor, key: Tensor, value: Tensor, *found: Tensor) -> Tensor:
        given = called(case, [query, key, value])
        return layer.compute(layer.config, {**state, **dict(zip(names, found, strict=True))}, given)

    torch.autograd.gradcheck(attention, (*tokens, *learned), fast_mode=True)
    output = attention(*tokens, *learned)
    grads = torch.autograd.grad(output.square().sum(), learned, allow_unused=True)
    for name, grad in zip(names, grads, strict=True):
        # Beside nothing exact the mass of all slots together, and what of it depends on the query, have no effect.
        has_effect = bool(layer.config.window_size) or name not in ("far_offset", "far_slope")
        assert has_effect == (grad is not None and bool(grad.abs().max() > 1e-9)), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(case: str, dtype: torch.dtype) -> None:
    """With queries, keys and values a hundred times larger than usual: outputs and all gradients."""
    layer = build(case)
    layer.set_tensors(trained(layer))
    layer.to(dtype)
    tokens = [(z * 100).to(dtype).requires_grad_() for z in inputs(9, batch=1)]
    output = layer.compute(layer.config, layer.tensors(), called(case, tokens))
    assert output.dtype == dtype
    output.float().mean().backward()
    found = {"output": output, **{name: z.grad for name, z in layer.named_parameters()}}
    found |= {name: z.grad for name, z in zip(("query", "key", "value"), tokens, strict=True)}
    assert not [name for name, z in found.items() if z is not None and not z.isfinite().all()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_of_values_is_for_images(kind: str) -> None:
    record = get_kind(kind)
    fields = {"window_size": 2, record.size_field: 3}
    with pytest.raises(ConfigError, match="value_convolution must be False without learned=True"):
        record.config_cls(value_convolution=True, **fields)
    settings = record.config_cls(learned=True, value_convolution=True, **fields)
    with pytest.raises(ConfigError, match="value_convolution must be False in a causal layer"):
        record.module_cls(settings, LayerShape(HEADS, DIM, 0, is_causal=True))
    with pytest.raises(ConfigError, match="value_convolution must be False in a model of sequences"):
        record.module_cls.check_grid(settings, is_image=False)
    record.module_cls.check_grid(settings, is_image=True)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_convolution_settings_are_as_they_were(kind: str) -> None:
    settings = get_kind(kind).config_cls(learned=True)
    assert "value_convolution" not in settings.to_dict()
    again = settings.replace(value_convolution=True)
    assert type(again).from_dict(again.to_dict()) == again


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("-window")])
def test_residual_maps_learn_with_a_smaller_rate(case: str) -> None:
    layers = [build(case) for _ in range(2)]
    groups = parameter_groups(layers, 0.1)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    named = [pair for layer in layers for pair in layer.named_parameters()]
    expected = {id(parameter): 0.1 * (0.3 if name.endswith("adapter") else 1.0) for name, parameter in named}
    assert rates == pytest.approx(expected)
