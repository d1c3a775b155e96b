"""The default of every setting that depends on the kind and the model family, in one place.

A field that is `None` in a config takes its value from here when a model is converted (the saved config is explicit)
or, in native mode, at every call. `docs/decisions.md` says how the values were chosen.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, did_you_mean
from .config import AttentionConfig
from .registry import get_kind

# Families beyond the three that can be converted share the defaults of the closest one.
FAMILIES = {
    "bert": "encoder",
    "gpt2": "decoder",
    "vit": "vision",
    "encoder": "encoder",
    "decoder": "decoder",
    "vision": "vision",
}

_BASE: dict[str, dict[str, Any]] = {
    "encoder": {"window_size": 32, "num_global_tokens": 0},
    "decoder": {"window_size": 32, "num_global_tokens": 0},
    # In 2-D the window is the side of a square of patches: 4 x 4 = 16 of them.
    "vision": {"window_size": 4, "num_global_tokens": 1},
}

_BY_KIND: dict[tuple[str, str], dict[str, Any]] = {
    ("eva", "encoder"): {"query_proposals": True},
    ("eva", "vision"): {"query_proposals": True},
    ("eva", "decoder"): {"query_proposals": False},
}


def family_defaults(kind: str, family: str) -> dict[str, Any]:
    """Defaults of one kind in one model family. Raises `ConfigError` for an unknown family."""
    if family not in FAMILIES:
        raise ConfigError(
            f"Unknown model family {family!r}; families: {sorted(FAMILIES)}.{did_you_mean(family, FAMILIES)}"
        )
    group = FAMILIES[family]
    return {**_BASE[group], **_BY_KIND.get((kind, group), {})}


def resolve(config: AttentionConfig, family: str) -> AttentionConfig:
    """A copy of `config` with every `None` field filled in for the family."""
    return config.filled(family_defaults(config.kind, family))


def default_config(kind: str, family: str) -> AttentionConfig:
    """The settings a kind has in a family when the user says nothing."""
    return resolve(get_kind(kind).config_cls(), family)
