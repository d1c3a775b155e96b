"""Adapters (PEFT) of a converted model: they have to hold what changes in its layers while they are in place.

An adapter's file has what it has learned, and nothing of the model round which it goes. Directions that are redrawn
and statistics that are calibrated meanwhile would be missing in it: loaded again, it would compute something else.
PEFT has a place for whole modules of a model, `modules_to_save`: one copy per adapter, saved and loaded with it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..modules.base import LinearAttention
from .layers import ATTRIBUTE, has_copies, linear_layer
from .seams import PreTrainedModel

logger = logging.getLogger(__name__)


def keep_in_adapters(model: nn.Module, changing: Callable[[LinearAttention], bool]) -> None:
    """Give the active adapter a copy of every layer that is about to change, as `modules_to_save=["linattn"]` does.

    Does nothing without an adapter, and for layers of which it has one. What is trained stays as it is.
    Raises: `UnsupportedError` for several active adapters: PEFT can use the copy of one only.
    """
    if "peft" not in sys.modules:
        return
    held = [module for module in model.modules() if ATTRIBUTE in module._modules]
    for root in model.modules():
        configs = root.__dict__.get("peft_config", root.__dict__.get("_peft_config"))
        if not isinstance(configs, dict) or not configs:
            continue
        names = _active(root)
        inside = set(root.modules())
        kept = [_keep(module, names, changing) for module in held if module in inside]
        if any(kept) and not _is_from_transformers(root):
            _note(configs.get(names[0]))


def _active(root: Any) -> list[str]:
    """Names of the active adapters of a model; none within `disable_adapter()`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in root.modules():
        if isinstance(module, BaseTunerLayer):
            return [] if module.disable_adapters else list(module.active_adapters)
    names = getattr(root, "active_adapter", [])  # virtual tokens, which have no layers
    return [names] if isinstance(names, str) else list(names)


def _is_from_transformers(root: nn.Module) -> bool:
    """Whether `model.add_adapter` has put the adapter in, without a PeftModel: then `model.load_adapter` loads what is
    in the file under the names of the model, but nothing of a copy that the config names."""
    if not isinstance(root, PreTrainedModel):
        return False
    try:
        return bool(root.active_adapters())
    except ValueError:  # no adapter of that kind
        return False


def _keep(module: Any, names: list[str], changing: Callable[[LinearAttention], bool]) -> bool:
    """Whether an attention module's layer is now in a copy of its own."""
    from peft.utils import ModulesToSaveWrapper

    layer, held = linear_layer(module), getattr(module, ATTRIBUTE)
    if layer is None or not names or not changing(layer) or (has_copies(held) and names[0] in held.modules_to_save):
        return False
    if len(names) > 1:
        raise UnsupportedError(
            f"The directions or statistics of a layer belong to one adapter; {names} are active. Activate the one that"
            " is to have them: model.set_adapter(name)."
        )
    trained = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    if has_copies(held):
        held.update(names[0])
    else:
        held = ModulesToSaveWrapper(held, names[0])
        setattr(module, ATTRIBUTE, held)
    held.set_adapter(names[0])
    for name, parameter in held.modules_to_save[names[0]].named_parameters():
        parameter.requires_grad_(trained.get(name, parameter.requires_grad))
    return True


def _note(config: Any) -> None:
    """Write into an adapter's config what it holds, so that a loaded one gets its own copies."""
    modules = list(getattr(config, "modules_to_save", None) or [])
    if config is not None and ATTRIBUTE not in modules:
        config.modules_to_save = [*modules, ATTRIBUTE]
    logger.info("The adapter holds the directions and statistics of the layers from now on (modules_to_save).")


def name_as_unsaved(model: nn.Module, kind: str) -> None:
    """Give a converted model a name for which adapters of it are refused, until it is loaded from where it was saved.

    PEFT writes a model's `name_or_path` into the adapter as the base to load. That of the stock checkpoint would be
    softmax attention. Whoever loads such an adapter is shown this name in the error. The config keeps the name of the
    stock checkpoint, from which cards are written.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            source = part.config.name_or_path or type(part).__name__
            part.name_or_path = f"({source} converted to {kind}: save it, and make adapters of the saved model)"


def name_as_stock(model: nn.Module) -> None:
    """Undo `name_as_unsaved`."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.name_or_path = part.config.name_or_path
