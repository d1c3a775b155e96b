"""Which modules of a model attend, and which of them ask Transformers for their attention function.

Read from the code of their classes: the names that their methods use. Nothing of the model is run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from .seams import INTERFACE_NAMES, PreTrainedConfig, PreTrainedModel

# What computes attention weights, in a class whose name says that it attends.
_SOFTMAX = frozenset({"softmax", "Softmax", "scaled_dot_product_attention", "logsumexp"})
_ATTENTION = ("attention", "attn")


@dataclass
class Part:
    """The modules of a model that share a config, which says by name how they attend.

    Args:
        config: Where the name is read.
        owner: Class name of the innermost Transformers model around them.
        asking: Modules that ask Transformers' AttentionInterface for their attention function.
        alone: Modules that compute softmax attention without asking.
    """

    config: Any
    owner: str
    asking: list[nn.Module] = field(default_factory=list)
    alone: list[nn.Module] = field(default_factory=list)


def parts_of(model: Any) -> list[Part]:
    """The parts of a model that attend, outer ones first."""
    found: dict[int, Part] = {}
    waiting: list[tuple[nn.Module, Any, str]] = [(model, getattr(model, "config", None), type(model).__name__)]
    seen: set[int] = set()
    while waiting:
        module, config, owner = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, PreTrainedModel):
            owner = type(module).__name__
        own = getattr(module, "config", None)
        config = own if isinstance(own, PreTrainedConfig) else config
        cls: Any = type(module)
        asks = asks_interface(cls)
        if asks or attends_alone(cls):
            part = found.setdefault(id(config), Part(config, owner))
            (part.asking if asks else part.alone).append(module)
        waiting += [(child, config, owner) for child in reversed(list(module.children()))]
    return list(found.values())


@functools.lru_cache(maxsize=4096)
def asks_interface(cls: Any) -> bool:
    """Whether a module class asks Transformers' AttentionInterface for its attention function."""
    return any(not _names(function).isdisjoint(INTERFACE_NAMES) for function in _functions(cls))


@functools.lru_cache(maxsize=4096)
def attends_alone(cls: Any) -> bool:
    """Whether a module class computes softmax attention without asking."""
    if issubclass(cls, nn.MultiheadAttention):
        return True
    named = any(part in cls.__name__.lower() for part in _ATTENTION) and not issubclass(cls, PreTrainedModel)
    if not named or asks_interface(cls):
        return False
    return any(not _names(function).isdisjoint(_SOFTMAX) for function in _functions(cls))


def _functions(cls: type) -> Iterator[FunctionType]:
    """Methods of a class and of its bases, but for those of torch and of every model."""
    for base in cls.__mro__:
        if base not in PreTrainedModel.__mro__ and not base.__module__.startswith("torch."):
            for value in vars(base).values():
                function = inspect.unwrap(value) if callable(value) else value
                if isinstance(function, FunctionType):
                    yield function


def _names(function: FunctionType) -> set[str]:
    """Names that a function uses, with those of functions inside it."""
    names: set[str] = set()
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names
