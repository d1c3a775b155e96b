"""The `LinearAttention` of a converted layer, also where PEFT has put something round it.

What an attention module has as `.linattn` may be a wrapper that computes with a copy of the layer
(`modules_to_save=["linattn"]`) or with changed parameters (`target_parameters=["linattn.key_adapter"]`): calls go
through it, while settings, shapes and buffers are those of the layer inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..modules.base import LinearAttention

ATTRIBUTE = "linattn"


def linear_layer(module: nn.Module) -> LinearAttention | None:
    """The layer that an attention module computes with at present; `None` for softmax.

    Raises: `UnsupportedError` if what it holds is not one layer.
    """
    held = getattr(module, ATTRIBUTE, None)
    return held if held is None or isinstance(held, LinearAttention) else _layer_in(held)


def active_layers(model: nn.Module) -> Iterator[LinearAttention]:
    """All layers of a model in use: not the originals of active copies, nor the copies of other adapters."""
    if isinstance(model, LinearAttention):
        yield model
    elif has_copies(model):
        yield from active_layers(_active_copy(model))
    else:
        for child in model.children():
            yield from active_layers(child)


def _layer_in(held: nn.Module) -> LinearAttention:
    layers = list(active_layers(held))
    if len(layers) != 1:
        raise UnsupportedError(
            f"A converted layer holds a {type(held).__name__} with {len(layers)} linear attention layers as its "
            f".{ATTRIBUTE}; it needs one. Take the wrapper off, or revert the model and convert it again."
        )
    return layers[0]


def has_copies(module: Any) -> bool:
    """Whether a module is PEFT's `ModulesToSaveWrapper`."""
    return "modules_to_save" in module._modules and "original_module" in module._modules


def _active_copy(wrapper: Any) -> nn.Module:
    """The module that the wrapper's forward calls."""
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names or any(name not in wrapper.modules_to_save for name in names):
        return wrapper.original_module
    return wrapper.modules_to_save[names[0]]
