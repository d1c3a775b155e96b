"""A model inside what other libraries put round it: the one a function works on, or which attribute to pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from .families import is_converted
from .seams import PreTrainedModel

# A class that shards the weights of what is inside: that cannot run by itself.
_SHARDS = "FullyShardedDataParallel"


def inside(given: Any, function: str) -> Any:
    """The Transformers model that a function which reads a model works on: `given`, or the one inside it.

    Args:
        given: A model, or one within wrappers: DataParallel, DistributedDataParallel, `torch.compile`, PEFT,
            SentenceTransformer, a pipeline, a Trainer, any module that holds one.
        function: For the message.
    Raises: `UnsupportedError` where there is none or more than one, or where what is inside computes something else.
    """
    if isinstance(given, PreTrainedModel):
        return given
    expression, model = _only(given, function)
    outer = given if isinstance(given, nn.Module) else given.model
    for wrapper in itertools.takewhile(lambda module: module is not model, outer.modules()):
        if _is(wrapper, _SHARDS):
            raise UnsupportedError(
                f"{function}() needs a model with all its weights; got {_name(given)}, which shards them. Call "
                f"{function}() before the model is wrapped."
            )
        if _is(wrapper, "PeftModel") and wrapper.active_peft_config.is_prompt_learning:
            raise UnsupportedError(
                f"{function}() runs what is inside {_name(given)}, which would not see its virtual tokens. Pass "
                f"{expression} for the model without them."
            )
    return model


def itself(given: Any, function: str) -> Any:
    """`given`, for a function that changes a model into another one, which a wrapper would not follow.

    Raises: `UnsupportedError` for anything but a Transformers model; the message names the one inside.
    """
    if not isinstance(given, PreTrainedModel):
        expression, model = _only(given, function)
        raise UnsupportedError(
            f"{function}() changes a Transformers model itself; got {_name(given)}. Pass what is inside, {expression} "
            f"(a {type(model).__name__}), before it is wrapped, and wrap it afterwards.{_adapter_advice(given)}"
        )
    return given


def refuse_adapter(model: nn.Module, function: str) -> None:
    """Raise `UnsupportedError` for a model with adapters (PEFT) in its layers: they would belong to another model."""
    if any(_is(module, "BaseTunerLayer") for module in model.modules()):
        raise UnsupportedError(
            f"{function}() needs a model without adapters; got {_name(model)} with some in it.{_adapter_advice(model)}"
        )


def converted_parts(model: Any) -> str:
    """A sentence naming the converted models inside a composite one; empty if there are none."""
    parts = {e: m for e, m in _search(model, "model") if is_converted(m.config)}
    named = " or ".join(f"{expression} (a {type(part).__name__})" for expression, part in parts.items())
    return f" Pass its converted part: {named}." if parts else ""


def module_of(given: Any, function: str) -> nn.Module:
    """`given`, or the module that a Trainer or a pipeline holds. Raises `UnsupportedError` for anything else."""
    if isinstance(given, nn.Module):
        return given
    _only(given, function)
    module: nn.Module = given.model
    return module


# -- helpers --------------------------------------------------------------------------------------------------------
def _only(given: Any, function: str) -> tuple[str, Any]:
    """The expression that leads from `model` to the one Transformers model in an object, and that model."""
    module, start = given, "model"
    if not isinstance(given, (nn.Module, type)):  # a Trainer, a pipeline
        module, start = getattr(given, "model", None), "model.model"
    found: dict[str, Any] = {}
    if isinstance(module, PreTrainedModel):
        found = {start: module}
    elif isinstance(module, nn.Module):
        found = dict(_search(module, start))
    if not found:
        raise UnsupportedError(
            f"{function}() needs a Transformers model; got {_name(given)}. Load one with "
            "AutoModel.from_pretrained(name)."
        )
    if len(found) > 1:
        named = ", ".join(f"{expression} (a {type(part).__name__})" for expression, part in found.items())
        raise UnsupportedError(f"{function}() needs one model; got {_name(given)} with several. Pass one: {named}.")
    return next(iter(found.items()))


def _search(module: nn.Module, expression: str) -> Iterator[tuple[str, Any]]:
    """The outermost Transformers models below a module."""
    children: Iterable[tuple[str, nn.Module]] = module.named_children()
    if _is(module, "PeftModel"):
        children = [("get_base_model()", module.get_base_model())]  # type: ignore[operator]
    for name, child in children:
        place = f"{expression}[{name}]" if name.isdecimal() else f"{expression}.{name}"
        if isinstance(child, PreTrainedModel):
            yield place, child
        else:
            yield from _search(child, place)


def _adapter_advice(given: Any) -> str:
    parts = given.modules() if isinstance(given, nn.Module) else ()
    if not any(_is(part, "BaseTunerLayer") or _is(part, "PeftModel") for part in parts):
        return ""
    return (
        " Take the adapter out first (PEFT: merge_and_unload() to keep what it has learned, unload() to drop it). A "
        "new adapter, or the saved one, goes round the model afterwards: PeftModel.from_pretrained(model, folder)."
    )


def _is(value: Any, name: str) -> bool:
    """Whether an object is of a class of another library, by its name: nothing is imported for it."""
    return any(cls.__name__ == name for cls in type(value).__mro__)


def _name(given: Any) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}"
    return f"{type(given).__name__} {given!r}" if isinstance(given, str) else type(given).__name__
