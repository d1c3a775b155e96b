"""How a release of Transformers may change what this library relies on: patches for `mutations.py`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from caches import cache_keyword, given_cache
from torch import nn
from transformers import (
    PreTrainedConfig,
    cache_utils,
    masking_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from hf_linattn.integrations import canary, seams
from hf_linattn.integrations.masks import linattn_mask
from hf_linattn.modules.registry import list_kinds

Patch = pytest.MonkeyPatch
Change = Callable[[Patch], None]
KIND = list_kinds()[0]


def replaced(owner: Any, name: str, value: Any) -> Change:
    return lambda patch: patch.setattr(owner, name, value)


def dropped(owner: Any, name: str) -> Change:
    return lambda patch: patch.delattr(owner, name)


def drop_entries(*names: str) -> Change:
    def change(patch: Patch) -> None:
        for name in names:
            if hasattr(cache_utils, name):
                patch.delitem(getattr(cache_utils, name), seams.LAYER_TYPE)

    return change


def mask_called_with(**changes: Any) -> Change:
    """Mask functions that are called with other arguments: a new name for an old one, or a value for a new one."""

    def renamed(**kwargs: Any) -> Any:
        for old, new in changes.items():
            kwargs[new if isinstance(new, str) else old] = kwargs.pop(old, new)
        return linattn_mask(**kwargs)

    registered = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    return lambda patch: patch.setitem(registered, KIND, renamed)


def attention_called_without(*names: str) -> Change:
    """Models that no longer pass some arguments on to attention functions."""

    def change(patch: Patch) -> None:
        from transformers.modeling_utils import AttentionInterface

        stock = AttentionInterface.get_interface

        def get_interface(self: Any, *args: Any) -> Any:
            function = stock(self, *args)

            def attention(*inputs: Any, **kwargs: Any) -> Any:
                return function(*inputs, **{name: value for name, value in kwargs.items() if name not in names})

            attention.__name__ = function.__name__
            return attention

        patch.setattr(AttentionInterface, "get_interface", get_interface)

    return change


def other_field(patch: Patch) -> None:
    """Configs that keep the attention implementation elsewhere."""
    field = property(lambda self: self.__dict__.get("_elsewhere"), lambda self, v: self.__dict__.update(_elsewhere=v))
    patch.setattr(PreTrainedConfig, "_attn_implementation", field)


def unseen_cache(patch: Patch) -> None:
    """Attention modules that get their cache in another way than as an argument."""
    forward, taken = GPT2Attention.forward, []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(kwargs.pop(cache_keyword(), None))
        return nn.Module.__call__(self, *args, **kwargs)

    patch.setattr(GPT2Attention, "__call__", call, raising=False)

    @functools.wraps(forward)
    def given(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **given_cache(taken.pop()), **kwargs)

    patch.setattr(GPT2Attention, "forward", given)


def renamed(forward: Any, old: str, new: str) -> Any:
    """A forward that takes one argument under another name only."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert old not in kwargs, f"unexpected keyword argument {old!r}"
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [p.replace(name=new) if p.name == old else p for p in signature.parameters.values()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


class OtherRegistry(dict[Any, Any]):
    """A registry of recorded outputs that has other keys."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(getattr(type(key), "__name__", key), value)


def closed(forward: Any) -> Any:
    """A forward that no longer takes arguments it does not know."""
    known = [name for name in inspect.signature(forward).parameters if name not in ("self", "kwargs")]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        return forward(self, *args, **kwargs)

    call.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return call


def without(forward: Any, name: str) -> Any:
    """A forward that takes an argument and does nothing with it."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{key: None if key == name else value for key, value in kwargs.items()})

    return call


def inverted_mask(*args: Any, **kwargs: Any) -> Any:
    mask = masking_utils.create_causal_mask(*args, **kwargs)
    if mask.tokens is not None:
        mask.tokens = ~mask.tokens
    return mask


def inverted_softmax(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None if mask is None else ~mask, **kwargs)


def initialise_all(self: Any) -> None:
    for module in self.modules():
        self._init_weights(module)


def not_causal(init: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        del self.is_causal

    return __init__


def asked(*groups: str) -> Change:
    """As if the canary had found these groups in order: what only the use itself can tell."""
    return lambda patch: patch.setattr(canary, "passed", set(groups))


def all_of(*changes: Change) -> Change:
    return lambda patch: [change(patch) for change in changes] and None


def nothing(patch: Patch) -> None:
    """The model itself is what differs."""
