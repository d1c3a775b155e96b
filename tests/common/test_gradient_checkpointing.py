"""Recomputing activations: switched on and off, in both ways that torch has, with every head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import checkpoint_activations, largest
from heads import WITH_LOSS, Stock, convert, every_class_and_family, inputs, labels


def is_on(model: Any) -> bool:
    return bool(getattr(model, "is_activation_checkpointing", False)) or any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )


def gradients(model: Any, stock: Stock) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs(stock), **labels(stock)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@every_class_and_family(WITH_LOSS)
def test_the_same_gradients(stock: Stock, kind: str, reentrant: bool) -> None:
    model = convert(stock, kind).train()
    expected = gradients(model, stock)
    assert not is_on(model)
    checkpoint_activations(model, {"use_reentrant": reentrant})
    assert is_on(model)
    found = gradients(model, stock)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert largest(found[name] - gradient) <= 1e-5 * (1 + largest(gradient)), name
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert not is_on(model)


@every_class_and_family(WITH_LOSS)
def test_frozen_weights_and_inputs_that_need_gradients(stock: Stock, kind: str) -> None:
    """As adapters are trained: nothing but the states of the attention learns, and recomputation still reaches it."""
    model = convert(stock, kind).train()
    learned = [p for name, p in model.named_parameters() if "linattn" in name]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in learned:
        parameter.requires_grad_(True)
    model.enable_input_require_grads()
    checkpoint_activations(model, {"use_reentrant": True})
    loss = model(**inputs(stock), **labels(stock)).loss
    assert loss.requires_grad
    loss.backward()
    assert all(parameter.grad is not None for parameter in learned)
    model.disable_input_require_grads()
