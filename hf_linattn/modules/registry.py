"""Which attention kinds exist and what each can do.

A kind's own module calls `register_kind` when it is imported; the built-in ones are imported on first use of the
registry.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, did_you_mean
from .config import AttentionConfig
from .defaults import resolve

if TYPE_CHECKING:
    from .base import LinearAttention

BUILTIN_KINDS = {
    "favor_plus": "hf_linattn.modules.kinds.favor_plus",
    "favor_sharp": "hf_linattn.modules.kinds.favor_sharp",
    "lara": "hf_linattn.modules.kinds.lara",
    "eva": "hf_linattn.modules.kinds.eva",
}


@dataclass(frozen=True)
class AttentionKind:
    """What the library declares about a kind; errors, tests and documentation are driven by it.

    Args:
        name: The name used with `attn_implementation` and in config files.
        title: The name used in prose ("FAVOR+").
        config_cls: Settings dataclass.
        module_cls: `LinearAttention` subclass.
        supports_causal: Has a form in which no query sees a later key.
        causal_needs_data: That form exists only in a converted model that has been calibrated.
        supports_cross: Has a form for queries and keys of different sequences (without a window).
        paper: Where the method comes from.
    """

    name: str
    title: str
    config_cls: type[AttentionConfig]
    module_cls: type[LinearAttention]
    supports_causal: bool
    supports_cross: bool
    paper: str
    causal_needs_data: bool = False


_KINDS: dict[str, AttentionKind] = {}


def register_kind(kind: AttentionKind) -> None:
    """Add a kind. Raises `ConfigError` if the name is taken by another class."""
    present = _KINDS.get(kind.name)
    if present is not None and present.module_cls is not kind.module_cls:
        raise ConfigError(f"Attention kind {kind.name!r} is already registered by {present.module_cls!r}.")
    _KINDS[kind.name] = kind


def list_kinds() -> list[str]:
    """Names of all registered kinds, sorted."""
    return sorted({*BUILTIN_KINDS, *_KINDS})


def get_kind(name: str) -> AttentionKind:
    """The declaration of one kind. Raises `ConfigError` for an unknown name, naming near misses."""
    if not isinstance(name, str):
        raise ConfigError(
            f"The name of an attention kind must be a string; got {name!r}; registered kinds: {list_kinds()}."
        )
    if name not in _KINDS and name in BUILTIN_KINDS:
        importlib.import_module(BUILTIN_KINDS[name])
    if name not in _KINDS:
        kinds = list_kinds()
        raise ConfigError(f"Unknown attention kind {name!r}; registered kinds: {kinds}.{did_you_mean(name, kinds)}")
    return _KINDS[name]


def config_from_dict(values: Mapping[str, Any]) -> AttentionConfig:
    """Build the settings of any kind from its dictionary form (which names the kind under `"kind"`)."""
    if "kind" not in values:
        raise ConfigError(
            f"The settings of an attention kind need the key 'kind' (one of {list_kinds()}); got {dict(values)!r}."
        )
    return get_kind(values["kind"]).config_cls.from_dict(values)


def default_config(name: str, family: str) -> AttentionConfig:
    """The settings a kind has in a model family when the user says nothing."""
    return resolve(get_kind(name).config_cls(), family)
